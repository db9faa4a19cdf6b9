-- A heartbeat. LOST when the lease is over: the end of a lease is final, it is never set up again for this incarnation.
-- Returns OK, owned runs, owned runs with a cancel request, how many other leases there are | LOST
--#include early
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS then return {'LOST'} end
-- Changes nothing, but a full Redis takes it, and then the rest of the script: no lease is lost for want of memory
redis.call('PERSIST', k.workers())
redis.call('ZADD', k.workers(), digits(NOW_MS + lease_ms), incarnation)
redis.call('HSET', k.fleet_lag(), incarnation, digits(loop_lag_ms))
-- From now on its connection tells of it, if this server sees that; and `renewed_within_ms` from now it will have renewed again, if it lives
if server ~= '' and (listeners(incarnation) or 0) > 0 then
  redis.call('ZREM', k.silent(), incarnation)
  redis.call('HSET', k.watched(), incarnation, server .. ' ' .. digits(NOW_MS + renewed_within_ms))
else
  forget_connection(incarnation)
end
return {'OK', redis.call('SMEMBERS', k.worker_runs(incarnation)), redis.call('SMEMBERS', k.worker_box(incarnation)),
  redis.call('ZCARD', k.workers()) - 1}
