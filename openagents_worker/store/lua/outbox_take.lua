-- Takes ended runs that a recipient must be notified of, and plans their next try, which happens unless `outbox_done.lua` removes them before.
-- It also registers the recipient: from then on `end_run` adds every end for it, until it was not registered again for a day.
-- Returns `Taken`
--#include time
redis.call('ZADD', k.recipients(), digits(NOW_MS), recipient)
redis.call('PEXPIRE', k.recipients(), 86400000)
local taken = {}
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', k.outbox(recipient), '-inf', digits(NOW_MS), 'LIMIT', 0, limit)) do
  local life, run_id = string.match(entry, '^(%d+):(.+)$')
  if life then
    local try = redis.call('HINCRBY', k.outbox_tries(recipient), entry, 1)
    redis.call('PEXPIRE', k.outbox_tries(recipient), RUN_TTL_MS)
    local pause_ms = math.min(retry_ms * 2 ^ math.min(try - 1, 20), math.max(max_retry_ms, retry_ms))
    redis.call('ZADD', k.outbox(recipient), digits(NOW_MS + pause_ms), entry)
    taken[#taken + 1] = {run_id = run_id, life = tonumber(life), tries = try}
  else
    redis.call('ZREM', k.outbox(recipient), entry) -- another program has written it
  end
end
local first = redis.call('ZRANGE', k.outbox(recipient), 0, 0, 'WITHSCORES')
return reply{ends = taken, next_ms = first[2] and math.max(0, tonumber(first[2]) - NOW_MS)}
