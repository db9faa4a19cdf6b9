-- A worker process begins: its lease, where it runs, and the agents it can carry. `info` is what it says of itself, a JSON object to which
-- the time is added, as it stands: JSON that goes through Lua loses its empty lists. `previous`: it lives, and had that incarnation until its
-- lease was lost. Returns the lease's deadline in ms, its neighbours
--#include deaths
--#include early
--#include neighbours
redis.call('ZADD', k.workers(), digits(NOW_MS + lease_ms), incarnation)
redis.call('DEL', k.lease_end(incarnation), k.lease_end_runs(incarnation)) -- it has none; ids come again in tests only
for i = 1, #agents, 2 do redis.call('HSET', k.agents(), agents[i], agents[i + 1]) end -- id, JSON, id, JSON, …
if previous ~= '' then answers(previous) end
-- A worker of the version before takes leases away and leaves what was said of them
for _, other in ipairs(redis.call('HKEYS', k.fleet())) do
  if not redis.call('ZSCORE', k.workers(), other) then forget_fleet(other) end
end
if info ~= '' then
  redis.call('HSET', k.fleet(), incarnation, string.sub(info, 1, -2) .. ',"started_at":' .. digits(NOW_MS) .. '}')
end
forget_connection(incarnation) -- the first renewal will tell of it
join(host, incarnation, process)
return {digits(NOW_MS + lease_ms), neighbours(host)}
