-- Takes out of the lists that are due what is gone: runs and sessions whose records have expired. About `limit` entries a call, of
-- one list after the other; each list counts as some entries more.
-- `name` '' begins with the list that is due first, `kept` is how many old entries of that list a look has passed over because they are still there.
-- Returns looked (0: no list is due any more), name and kept for the call that goes on with the same list ('' when it is done), removed
--#include index
local LOOK_AGAIN_MS = 3600000 -- at the latest, at a list with entries that are older than a run's time to live, and still there
local LIST_COSTS = 4 -- as many entries: to find it, to read it, to say when it is due next

-- due_again(name, kept): when the list is to be looked through next, now that this has been done
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
    if not name then return {0, '', 0, removed} end
  end
  local old = redis.call('ZRANGEBYSCORE', k.index(name), '-inf', digits(NOW_MS - ttl_ms_of(name)), 'LIMIT', kept, left)
  local gone = 0
  for _, id in ipairs(old) do
    if is_gone(name, id) then gone = gone + redis.call('ZREM', k.index(name), id) end
  end
  removed, kept = removed + gone, kept + #old - gone
  if #old == left then return {1, name, kept, removed} end
  due_again(name, kept)
  name, left = '', left - #old - LIST_COSTS
end
return {1, '', 0, removed}
