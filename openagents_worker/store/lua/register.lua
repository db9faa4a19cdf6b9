-- A worker process begins: its lease, and the agents it can carry. Returns the lease's deadline in ms.
--#include time
redis.call('ZADD', k.workers(), digits(NOW_MS + lease_ms), incarnation)
if #agents > 0 then redis.call('HSET', k.agents(), unpack(agents)) end -- id, JSON, id, JSON, …
return digits(NOW_MS + lease_ms)
