-- Appends a batch of events, and writes `facts` (name, value, name, value …) that the attempt states ahead of a record. A batch that is
-- already stored (because its answer was lost) is not stored again. `taken` are facts that a run without records has received. `format`: a worker
-- must be able to read it to execute the run. Returns OK | SAME | FENCED
--#include run
--#include records
--#include index
local run = live(run_id, fence)
if not run then return 'FENCED' end
if batch_no <= run.emit_no then return 'SAME' end
if #facts + #taken > 0 then needs(k.facts(run_id), 'hash') end
if #facts > 0 then redis.call('HSET', k.facts(run_id), unpack(facts)) end
take_facts(run_id, taken)
if format > run.format then redis.call('HSET', k.run(run_id), 'format', format) end
redis.call('HSET', k.run(run_id), 'emit_no', batch_no)
append(run, events)
return 'OK'
