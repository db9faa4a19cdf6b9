-- The watchdog is about to end its process, whose event loop this run blocks for good: of all its runs this one alone is suspect.
-- The lease ends at once: others need not wait for it. Returns OK | FENCED (the run is not in the hands of this worker)
--#include run
local run = load(run_id)
if not run or run.owner ~= incarnation or run.state ~= STATE.running then return 'FENCED' end
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline then return 'FENCED' end
redis.call('HSET', k.lease_end(incarnation), 'named', run_id, 'died', '1')
redis.call('PEXPIRE', k.lease_end(incarnation), 600000)
if deadline > NOW_MS then redis.call('ZADD', k.workers(), digits(NOW_MS), incarnation) end
return 'OK'
