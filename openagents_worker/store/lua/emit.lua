-- Appends a batch of events. A batch that is already stored (because its answer was lost) is not stored again. Returns OK | SAME | FENCED
--#include run
local run = live(run_id, fence)
if not run then return 'FENCED' end
if batch_no <= run.emit_no then return 'SAME' end
redis.call('HSET', k.run(run_id), 'emit_no', batch_no)
append(run, events)
return 'OK'
