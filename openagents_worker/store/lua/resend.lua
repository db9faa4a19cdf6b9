-- Finds runs whose last wake-up is lost: it was sent before `oldest_us` (the send time of the oldest message in the queue) and longer ago than
-- `grace_ms`. Each run gets a new send time, so that it is not found again immediately. Returns a list of `Wake`
--#include resend
local before = math.min(oldest_us, NOW_US - grace_ms * 1000)
local wakes = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', k.sent(queue), '-inf', '(' .. digits(before), 'LIMIT', 0, limit)) do
  wakes[#wakes + 1] = sent_again(queue, id, grace_ms)
end
return reply(wakes)
