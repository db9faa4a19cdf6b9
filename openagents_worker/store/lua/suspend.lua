-- The owner puts a run aside: `retry` until it is due, `handover` for another worker at once. Returns OK, wakes | CANCEL | FENCED
-- Events: those given, then run.retry_scheduled or run.handed_over.
--#include run
local run = live(run_id, fence)
if not run then return {'FENCED'} end
if run.cancel == '1' then return {'CANCEL'} end
local fields = {'fence', next_fence(run), 'owner', '', 'emit_no', batch_no}
if kind == 'retry' then
  local due = NOW_MS + delay_ms
  redis.call('HSET', k.run(run_id), 'state', 'retrying', 'due', digits(due), 'retries', run.retries + 1, 'last_error', error_code, unpack(fields))
  if call ~= '' then redis.call('HINCRBY', k.facts(run_id), 'tries:' .. call, 1) end
  redis.call('ZADD', k.due(), digits(due), run_id)
  events[#events + 1] = 'run.retry_scheduled'
  events[#events + 1] = '{"due_at":"' .. iso(due) .. '","delay_ms":' .. digits(delay_ms) .. ',"error_code":' .. q(error_code)
    .. ',"attempt_index":' .. digits(run.retries + 1) .. '}'
else
  redis.call('HSET', k.run(run_id), 'state', 'queued', unpack(fields))
  events[#events + 1] = 'run.handed_over'
  events[#events + 1] = '{"checkpoint_id":' .. q(run_id .. ':step:' .. digits(run.steps)) .. '}'
end
leave(run)
append(run, events)
if kind == 'retry' then return {'OK', {}} end
return {'OK', {wake_of(run)}}
