-- The watchdog of a worker names the run that blocks its event loop, before it ends the process. Only this run becomes a suspect.
-- The lease ends immediately, so that other workers can take over the runs. Returns 1, or 0 if this worker does not own the run
--#include run
local run = load(run_id)
if not run or run.owner ~= incarnation or run.state ~= STATE.running then return 0 end
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline then return 0 end
redis.call('HSET', k.lease_end(incarnation), 'named', run_id, 'died', '1')
redis.call('PEXPIRE', k.lease_end(incarnation), 600000)
if deadline > NOW_MS then redis.call('ZADD', k.workers(), digits(NOW_MS), incarnation) end
return 1
