-- As resend, for a queue that nobody can read: a run's wake-up counts as lost after the grace, and each time it was sent again
-- for that, after twice as long; never longer than `max_grace_ms`. A run is looked at once a sending, when it may be lost first,
-- and then when it is. Returns wakes, how many were looked at
--#include resend
local OF_ONE_MOMENT = 1000 -- one script sends a hundred at most
local sent, waits, seen_key = k.sent(queue), k.resend(queue), k.resend_seen(queue)

-- When a run's wake-up counts as lost, in µs, and how often it has been sent again; a new wake-up begins anew
local function lost_at(id, sent_us)
  local at, times = string.match(field_of(id, 'resent') or '', '^(%d+):(%d+)$')
  times = at == digits(sent_us) and tonumber(times) or 0
  return sent_us + math.min(grace_ms * 2 ^ times, max_grace_ms) * 1000, times
end

local before = NOW_US - grace_ms * 1000
local seen = tonumber(redis.call('GET', seen_key) or 0)
if seen > before then seen = 0 end -- the clock has gone back
local found = redis.call('ZRANGEBYSCORE', sent, '(' .. digits(seen), digits(before), 'WITHSCORES', 'LIMIT', 0, limit)
local looked = #found / 2
if looked == limit then -- all that were sent in one moment, or those behind the limit would be passed over until `seen` is forgotten
  local last = found[#found]
  for _, word in ipairs(redis.call('ZRANGEBYSCORE', sent, last, last, 'WITHSCORES', 'LIMIT', 0, OF_ONE_MOMENT)) do found[#found + 1] = word end
end
-- Forgotten after a while, so that each entry is looked at again even if a clock went back unseen.
local until_ms = redis.call('PTTL', seen_key)
redis.call('SET', seen_key, digits(tonumber(found[#found]) or seen), 'PX', digits(until_ms > 0 and until_ms or max_grace_ms))
for i = 1, #found, 2 do redis.call('ZADD', waits, digits((lost_at(found[i], tonumber(found[i + 1])))), found[i]) end

local wakes = {}
local ids = redis.call('ZRANGEBYSCORE', waits, '-inf', digits(NOW_US), 'LIMIT', 0, limit)
for _, id in ipairs(ids) do
  redis.call('ZREM', waits, id)
  local sent_us = redis.call('ZSCORE', sent, id)
  if sent_us then
    local at, times = lost_at(id, tonumber(sent_us))
    if at > NOW_US then -- it was sent for something else meanwhile
      redis.call('ZADD', waits, digits(at), id)
    else
      local wake = sent_again(queue, id, grace_ms)
      if wake then redis.call('HSET', k.run(id), 'resent', wake[3] .. ':' .. digits(times + 1)) end
      wakes[#wakes + 1] = wake
    end
  end
end
redis.call('PEXPIRE', waits, digits(2 * max_grace_ms))
return {wakes, math.max(looked, #ids)}
