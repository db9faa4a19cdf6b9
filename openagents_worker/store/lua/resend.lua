-- Runs whose last wake-up can no longer be in the queue: sent before `oldest_us` (of the queue's oldest message) and longer ago
-- than the grace. Each gets a new send time, so that it is not a candidate again at once. Returns wakes
--#include run
local before = math.min(oldest_us, NOW_US - grace_ms * 1000)
local wakes = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', k.sent(queue), '-inf', '(' .. digits(before), 'LIMIT', 0, limit)) do
  local run = load(id)
  if run and run.state == 'queued' and run.owner == '' then
    wakes[#wakes + 1] = wake_of(run)
  else
    redis.call('ZREM', k.sent(queue), id)
  end
end
return wakes
