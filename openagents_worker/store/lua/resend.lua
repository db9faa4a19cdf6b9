-- Runs whose last wake-up can no longer be in the queue: sent before `oldest_us` (of the queue's oldest message) and longer ago
-- than the grace. Each gets a new send time, so that it is not a candidate again at once. Returns wakes
-- A run that has ended is among them until Celery was told; ever less often, as who tells may fail each time.
--#include run
local before = math.min(oldest_us, NOW_US - grace_ms * 1000)
local wakes = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', k.sent(queue), '-inf', '(' .. digits(before), 'LIMIT', 0, limit)) do
  local run = load(id)
  if run and run.state == 'queued' and run.owner == '' then
    wakes[#wakes + 1] = wake_of(run)
  elseif run and TERMINAL[run.state] and redis.call('HEXISTS', k.run(id), 'untold') == 1 then
    wakes[#wakes + 1] = wake_of(run)
    local tellings = redis.call('HINCRBY', k.run(id), 'tellings', 1)
    local pause_ms = math.min(grace_ms * (2 ^ math.min(tellings, 20) - 2), 600000)
    redis.call('ZINCRBY', k.sent(queue), digits(pause_ms * 1000), id)
  else
    redis.call('ZREM', k.sent(queue), id)
  end
end
return wakes
