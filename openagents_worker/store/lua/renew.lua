-- A heartbeat. `lost` if the lease is over: this is final, an incarnation never gets another lease.
-- Returns `Renewal`
--#include early
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS then return reply{lost = true} end
-- No effect, but Redis allows it when its memory is full, and then allows the other writes: no lease is lost because the memory is full
redis.call('PERSIST', k.workers())
redis.call('ZADD', k.workers(), digits(NOW_MS + lease_ms), incarnation)
redis.call('HSET', k.fleet_lag(), incarnation, digits(loop_lag_ms))
if parts == '' then redis.call('DEL', k.worker_parts(incarnation))
else redis.call('SET', k.worker_parts(incarnation), '{"at":' .. digits(NOW_MS) .. ',"parts":' .. parts .. '}', 'PX', digits(lease_ms)) end
-- From now on its connection shows whether it is alive, if this server sees the connection. A live worker renews again within `renewed_within_ms`
if server ~= '' and (listeners(incarnation) or 0) > 0 then
  redis.call('ZREM', k.silent(), incarnation)
  redis.call('HSET', k.watched(), incarnation, server .. ' ' .. digits(NOW_MS + renewed_within_ms))
else
  forget_connection(incarnation)
end
return reply{owned = redis.call('SMEMBERS', k.worker_runs(incarnation)), notices = redis.call('SMEMBERS', k.worker_box(incarnation)),
  others = redis.call('ZCARD', k.workers()) - 1}
