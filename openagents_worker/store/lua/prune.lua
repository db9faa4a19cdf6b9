-- Removes runs and sessions whose records have expired from the indexes that are due. Examines about `limit` entries in a call, of one
-- index after the other. Each index counts as some additional entries.
-- `name` '' starts with the index that is due first. `kept` is the number of old entries of this index that were examined before and still exist.
-- Returns `Pruned`: `looked` (false: no index is due), `name` and `kept` for the call that continues with the same index ('' if it is done)
--#include index
local LOOK_AGAIN_MS = 3600000 -- the longest time between two checks of an index with entries that are older than the TTL but still exist
local LIST_COSTS = 4 -- the cost of an index, in entries: to find it, to read it, to set when it is due next

-- due_again(name, kept): sets when the index is due next, after it was examined
local function due_again(name, kept)
  local ttl_ms = ttl_ms_of(name)
  local young = redis.call('ZRANGEBYSCORE', k.index(name), '(' .. digits(NOW_MS - ttl_ms), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if kept > 0 then
    redis.call('ZADD', k.indexes(), digits(NOW_MS + math.min(LOOK_AGAIN_MS, ttl_ms)), name)
  elseif young[1] then
    redis.call('ZADD', k.indexes(), digits(tonumber(young[2]) + ttl_ms + 1), name)
  else
    redis.call('ZREM', k.indexes(), name)
  end
end

local left, removed = limit, 0
while left > 0 do
  if name == '' then
    name, kept = redis.call('ZRANGEBYSCORE', k.indexes(), '-inf', digits(NOW_MS), 'LIMIT', 0, 1)[1], 0
    if not name then return reply{looked = false, name = '', kept = 0, removed = removed} end
  end
  local old = redis.call('ZRANGEBYSCORE', k.index(name), '-inf', digits(NOW_MS - ttl_ms_of(name)), 'WITHSCORES', 'LIMIT', kept, left)
  local examined, gone = #old / 2, 0
  for i = 1, #old, 2 do
    if is_gone(name, old[i], old[i + 1]) then gone = gone + redis.call('ZREM', k.index(name), old[i]) end
  end
  removed, kept = removed + gone, kept + examined - gone
  if examined == left then return reply{looked = true, name = name, kept = kept, removed = removed} end
  due_again(name, kept)
  name, left = '', left - examined - LIST_COSTS
end
return reply{looked = true, name = '', kept = 0, removed = removed}
