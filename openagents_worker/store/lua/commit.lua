-- Writes outcomes of recorded calls to the journal: this is the checkpoint. `position` is the number of records before them. `taken` are the
-- facts that the records replace. Repeating the call with the same records returns OK. Returns OK | CANCEL (stored; the run must stop) | FENCED | MISPLACED (the journal has another record
-- at this position: two programs use the same fence)
--#include run
--#include records
--#include index
local run = live(run_id, fence)
if not run then return 'FENCED' end
if #taken > 0 then needs(k.facts(run_id), 'hash') end
local key = k.journal(run_id)
local length = redis.call('LLEN', key)
local answer = run.cancel == '1' and 'CANCEL' or 'OK'
if length > position then
  for i, record in ipairs(records) do
    if redis.call('LINDEX', key, position + i - 1) ~= record then return 'MISPLACED' end
  end
  return answer
end
if length < position then return 'MISPLACED' end
redis.call('RPUSH', key, unpack(records))
if format > run.format then redis.call('HSET', k.run(run_id), 'format', format) end
take_facts(run_id, taken)
redis.call('HSET', k.run(run_id), 'steps', position + #records - 1, 'stuck', 0, 'retries', 0, 'usage', usage, 'emit_no', batch_no)
if run.suspicion ~= '' or run.stuck >= 2 then -- the process has survived this run, so the run is not a suspect any more
  redis.call('HDEL', k.run(run_id), 'suspicion')
  redis.call('SREM', k.suspects(run.owner), run_id)
end
append(run, events)
return answer
