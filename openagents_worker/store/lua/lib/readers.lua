--#include run
-- Which queues a live worker reads. The result is cached until the end of the lease of this worker, at least for a second.
local HOUR_MS, MOST_QUEUES, LOOK_AGAIN_MS = 3600000, 1000, 1000

-- read_until(queue): the end of the lease of a worker that reads the queue. Nil: none does. Now: a worker has not announced its queues
local function read_until(queue)
  local cards, said = redis.call('HGETALL', k.fleet()), 0
  for i = 1, #cards, 2 do
    local deadline = tonumber(redis.call('ZSCORE', k.workers(), cards[i]) or nil) or 0
    if deadline > NOW_MS then
      said = said + 1
      local queues = string.match(cards[i + 1], '"queues":(%b[])') or ''
      if string.find(queues, '"' .. queue .. '"', 1, true) or string.find(queues, q(queue), 1, true) then return deadline end
    end
  end
  if redis.call('ZCOUNT', k.workers(), '(' .. digits(NOW_MS), '+inf') > said then return NOW_MS end -- a worker of an earlier version
end

-- is_read_by_none(queue): whether no worker is known to read the queue
local function is_read_by_none(queue)
  local known = tonumber(redis.call('ZSCORE', k.served(), queue) or nil) or 0
  if math.abs(known) > NOW_MS then return known < 0 end
  local at = read_until(queue)
  local again = at and math.max(at, NOW_MS + LOOK_AGAIN_MS) or -(NOW_MS + LOOK_AGAIN_MS)
  redis.call('ZADD', k.served(), digits(again), queue)
  redis.call('ZREMRANGEBYRANK', k.served(), 0, -MOST_QUEUES - 1)
  redis.call('PEXPIRE', k.served(), HOUR_MS)
  return at == nil
end

-- queued_payload(run): the payload of run.queued, with a hint if no worker reads the queue
local function queued_payload(run)
  local hint = ''
  if is_read_by_none(run.queue) then
    hint = ',"workers":0,"hint":"no live worker reads this queue; start one: openagents-worker worker --queues NAME"'
  end
  return '{"queue":' .. q(run.queue) .. hint .. '}'
end
