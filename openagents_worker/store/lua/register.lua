-- A worker process begins: its lease, where it runs, and the agents it can carry. Returns the lease's deadline in ms, its neighbours
--#include early
--#include neighbours
redis.call('ZADD', k.workers(), digits(NOW_MS + lease_ms), incarnation)
if #agents > 0 then redis.call('HSET', k.agents(), unpack(agents)) end -- id, JSON, id, JSON, …
forget_connection(incarnation) -- the first renewal will tell of it
join(host, incarnation, process)
return {digits(NOW_MS + lease_ms), neighbours(host)}
