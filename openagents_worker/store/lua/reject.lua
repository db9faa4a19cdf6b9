-- Creates a failed run for an invalid message. Returns 1, or 0 if a run with this id exists; it is not changed
--#include end_run
--#include new_run
if redis.call('EXISTS', k.run(run_id)) == 1 then return 0 end
local run = new_run(run_id, {format = 1, state = STATE.queued, queue = queue, agent = '-', session = '-', digest = '', uid = '', request = '',
  canvas = '', durable = 0}, {'all'})
append(run, {'run.queued', '{"queue":' .. q(queue) .. '}'})
end_run(run, foreign_ending(run, STATE.failed, 'failed', code, message, hint ~= '' and hint or nil))
return 1
