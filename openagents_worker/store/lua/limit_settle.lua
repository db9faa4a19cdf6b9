-- A request has ended, or was not sent. The difference between the reserved and the `used` tokens (-1: unknown) is given back or taken; a
-- request that was not sent is given back if its time is still to come: what was not used in time is lost. blocked_ms: the provider asks all to
-- wait. A repeated call changes nothing more.
-- Returns `tuple[Wake, ...]`
--#include limits
local limit = limit_of(name)
local changed = {}
local id = reservation(run_id, fence, call)
local at_ms = tonumber(redis.call('ZSCORE', k.limit_calls(name), id))
if at_ms then
  redis.call('ZREM', k.limit_calls(name), id)
  if limit.tokens_per_minute > 0 and used >= 0 then
    limit.next_tokens_us = math.max(0, limit.next_tokens_us + cost_us(limit, used) - cost_us(limit, tokens))
    changed = {'next_tokens_us', digits(limit.next_tokens_us)}
  end
  if was_sent == 0 and limit.requests_per_minute > 0 and at_ms > NOW_MS then
    limit.next_us = math.max(0, limit.next_us - interval_us(limit))
    changed[#changed + 1] = 'next_us'
    changed[#changed + 1] = digits(limit.next_us)
  end
end
if blocked_ms > 0 and NOW_MS + blocked_ms > limit.blocked_until_ms then
  limit.blocked_until_ms = NOW_MS + blocked_ms
  changed[#changed + 1] = 'blocked_until_ms'
  changed[#changed + 1] = digits(limit.blocked_until_ms)
end
if #changed > 0 then
  redis.call('HSET', k.limit(name), unpack(changed))
  keep(k.limit(name))
end
return reply(serve(limit))
