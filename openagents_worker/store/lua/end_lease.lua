-- Ends the lease of a dead worker process. Then `reclaim` handles it like any other lease that is over. Returns OK | OVER
-- Only if the incarnation is registered with this process on this host: the caller has not checked any other process.
--#include early
if redis.call('HGET', k.host(host), incarnation) ~= process then return 'OVER' end
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS or is_off('process') then return 'OVER' end
redis.call('PERSIST', k.workers()) -- no effect, but Redis allows it when its memory is full, and then allows the other writes
end_early(incarnation, 'process')
return 'OK'
