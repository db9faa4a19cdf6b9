-- A request has ended, or was not sent. The difference between the reserved and the `used` tokens (-1: unknown) is given back or taken; a
-- request that was not sent is given back. blocked_ms: the provider asks all to wait. A repeated call changes nothing more.
-- Returns `tuple[Wake, ...]`
--#include limits
local limit = limit_of(name)
local changed = {}
if redis.call('ZREM', k.limit_calls(name), reservation(run_id, fence, call)) == 1 then
  if limit.tokens_per_minute > 0 and used >= 0 then
    limit.next_tokens_us = math.max(0, limit.next_tokens_us + cost_us(limit, used) - cost_us(limit, tokens))
    changed = {'next_tokens_us', digits(limit.next_tokens_us)}
  end
  if was_sent == 0 and limit.requests_per_minute > 0 then
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
