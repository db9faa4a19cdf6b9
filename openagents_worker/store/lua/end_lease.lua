-- The lease of a worker process that was seen to be dead ends now; from there on all is as at the end of any lease. Returns OK | OVER
-- Only whom its own host knows by that process: of any other incarnation nobody has seen anything.
--#include early
if redis.call('HGET', k.host(host), incarnation) ~= process then return 'OVER' end
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS or is_off('process') then return 'OVER' end
redis.call('PERSIST', k.workers()) -- changes nothing, but a full Redis takes it, and then the rest of the script
end_early(incarnation, 'process')
return 'OK'
