-- The owner gives a run back untouched (it was claimed by a worker that stops, or that does not know it). Returns OK, wake | FENCED
--#include run
local run = load(run_id)
if not run or run.fence ~= fence or run.owner ~= incarnation or run.state ~= 'running' then return {'FENCED'} end
redis.call('HSET', k.run(run_id), 'state', 'queued', 'fence', next_fence(run), 'owner', '')
leave(run)
return {'OK', wake_of(run)}
