-- Creates a failed run for an invalid message. Returns 1, or 0 if a run with this id exists; it is not changed
--#include end_run
if redis.call('EXISTS', k.run(run_id)) == 1 then return 0 end
redis.call('HSET', k.run(run_id), 'format', 1, 'state', STATE.queued, 'fence', '0:', 'owner', '', 'attempt', 0, 'life', 1, 'seq', 0,
  'emit_no', 0, 'steps', 0, 'retries', 0, 'recoveries', 0, 'stuck', 0, 'queue', queue, 'agent', '-', 'session', '-',
  'digest', '', 'uid', '', 'request', '', 'canvas', '', 'durable', 0, 'created', digits(NOW_MS))
local run = load(run_id)
list_in('all', run_id)
append(run, {'run.queued', '{"queue":' .. q(queue) .. '}'})
end_run(run, foreign_ending(run, STATE.failed, 'failed', code, message, hint ~= '' and hint or nil))
return 1
