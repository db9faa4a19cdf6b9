-- As resend, for a queue whose messages cannot be inspected. A wake-up counts as lost after `grace_ms`. The grace doubles with every resend, up to
-- `max_grace_ms`. After each send, a run is examined when `grace_ms` is over, and then when its own grace is over.
-- Returns `Woken`
--#include resend
local OF_ONE_MOMENT = 1000 -- a script sends at most a hundred messages, all with the same time
local sent, waits, seen_key = k.sent(queue), k.resend(queue), k.resend_seen(queue)

-- lost_at(id, sent_us): when the wake-up counts as lost, in µs, and how often it was sent again. A new wake-up starts at 0
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
if looked == limit then -- read all entries with the last send time, or those after the limit would be skipped until `seen` expires
  local last = found[#found]
  for _, word in ipairs(redis.call('ZRANGEBYSCORE', sent, last, last, 'WITHSCORES', 'LIMIT', 0, OF_ONE_MOMENT)) do found[#found + 1] = word end
end
-- `seen` expires, so that every entry is examined again even if the clock went back unnoticed.
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
    if at > NOW_US then -- another wake-up was sent in the meantime
      redis.call('ZADD', waits, digits(at), id)
    else
      local wake = sent_again(queue, id, grace_ms)
      if wake then redis.call('HSET', k.run(id), 'resent', digits(wake.sent_us) .. ':' .. digits(times + 1)) end
      wakes[#wakes + 1] = wake
    end
  end
end
redis.call('PEXPIRE', waits, digits(2 * max_grace_ms))
return reply{wakes = wakes, examined = math.max(looked, #ids)}
