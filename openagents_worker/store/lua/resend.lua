-- Runs whose last wake-up can no longer be in the queue: sent before `oldest_us` (of the queue's oldest message) and longer ago
-- than the grace. Each gets a new send time, so that it is not a candidate again at once. Returns wakes
--#include resend
local before = math.min(oldest_us, NOW_US - grace_ms * 1000)
local wakes = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', k.sent(queue), '-inf', '(' .. digits(before), 'LIMIT', 0, limit)) do
  wakes[#wakes + 1] = sent_again(queue, id, grace_ms)
end
return wakes
