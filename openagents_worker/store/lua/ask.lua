-- The owner asks for the approval of a call, with a batch of events. `value` is what is shown. A call that was asked about before keeps what was
-- shown then. The run is listed in the index `approvals` until nothing of it waits for an approval. `stored` is the number of records that the owner
-- has stored. Returns OK | SAME | FENCED | MISPLACED (Redis has lost some of them: this call may never be made)
--#include run
--#include records
--#include index
local run = live(run_id, fence)
if not run then return 'FENCED' end
if redis.call('LLEN', k.journal(run_id)) < stored then return 'MISPLACED' end
if batch_no <= run.emit_no then return 'SAME' end
needs(k.facts(run_id), 'hash')
redis.call('HSETNX', k.facts(run_id), FACT.ask .. call, value)
list_in(APPROVALS, run_id)
redis.call('HSET', k.run(run_id), 'emit_no', batch_no)
append(run, events)
return 'OK'
