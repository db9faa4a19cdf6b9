-- Takes out of a list what is gone: runs and sessions whose records have expired. `limit` entries a call.
-- `name` '' is the list that is due, `kept` how many of its old entries this look has passed over because they are still there.
-- Returns looked (0: no list is due), name and kept for the call that goes on with the same list ('' when it is done), removed
--#include index
local LOOK_AGAIN_MS = 3600000 -- at a list with entries that are older than a run's time to live, and still there

if name == '' then
  name = redis.call('ZRANGEBYSCORE', k.indexes(), '-inf', digits(NOW_MS), 'LIMIT', 0, 1)[1]
  if not name then return {0, '', 0, 0} end
end
local key, of_sessions = k.index(name), name == SESSIONS
local ttl_ms = of_sessions and SESSION_TTL_MS or RUN_TTL_MS
local old = redis.call('ZRANGEBYSCORE', key, '-inf', digits(NOW_MS - ttl_ms), 'LIMIT', kept, limit)
local removed = 0
for _, id in ipairs(old) do
  if redis.call('EXISTS', of_sessions and k.session(id) or k.run(id)) == 0 then
    redis.call('ZREM', key, id)
    removed = removed + 1
  end
end
kept = kept + #old - removed
if #old == limit then return {1, name, kept, removed} end

local young = redis.call('ZRANGEBYSCORE', key, '(' .. digits(NOW_MS - ttl_ms), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
if kept > 0 then
  redis.call('ZADD', k.indexes(), digits(NOW_MS + LOOK_AGAIN_MS), name)
elseif young[1] then
  redis.call('ZADD', k.indexes(), digits(tonumber(young[2]) + ttl_ms + 1), name)
else
  redis.call('ZREM', k.indexes(), name)
end
return {1, '', 0, removed}
