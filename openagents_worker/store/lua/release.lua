-- The owner gives a run back that has not ended. kind: `handover`: a worker that stops has claimed the run and executed nothing.
-- `lost`: the worker owns the run, but no task executes it. This counts as a recovery unless a record was committed since the claim.
-- Returns `WriteResult`. Event run.handed_over or run.recovered; for a run that ends: its terminal events.
--#include end_run
local run = load(run_id)
if not run or run.fence ~= fence or run.owner ~= incarnation or run.state ~= STATE.running then return reply{answer = 'FENCED'} end
if kind ~= 'handover' and kind ~= 'lost' then return redis.error_reply('ERR release has no kind ' .. kind) end
local counts = 0
if kind == 'lost' then
  local length_before = tonumber(string.match(field_of(run_id, 'claimed_at') or '', '^%d+:(%d+)$'))
  local length = journal_length(run_id)
  if length <= (length_before or length) then counts = 1 end
end
local stuck, recoveries, next = run.stuck + counts, run.recoveries + counts, next_fence(run)
redis.call('HSET', k.run(run_id), 'state', STATE.queued, 'fence', next, 'owner', '', 'stuck', stuck, 'recoveries', recoveries)
if kind == 'handover' then
  append(run, {'run.handed_over', '{"checkpoint_id":' .. q(run_id .. ':step:' .. digits(run.steps)) .. '}'})
else
  append(run, {'run.recovered', '{"previous_worker":' .. q(incarnation) .. ',"age_ms":0,"recoveries":' .. digits(recoveries) .. '}'})
end
leave(run)
run.fence, run.owner = next, ''
if kind == 'handover' or says_so_itself(run) then return reply{answer = 'OK', wakes = {wake_of(run)}} end
if run.cancel == '1' then return reply{answer = 'OK', wakes = cancelled(run, run.cancel_reason)} end
if run.durable == '0' then
  return reply{answer = 'OK', wakes = end_run(run, foreign_ending(run, STATE.failed, 'failed', 'worker.lost',
    'the worker could not complete this run, and the run is not durable'))}
end
if stuck > max_recoveries then
  append(run, {'run.poisoned', '{"recoveries":' .. digits(stuck) .. '}'})
  return reply{answer = 'OK', wakes = end_run(run, foreign_ending(run, STATE.failed, 'failed', 'run.poisoned', 'the run was given back or killed its workers '
    .. digits(stuck) .. ' times without a committed step in between', 'the logs of its workers contain the reason'))}
end
return reply{answer = 'OK', wakes = {wake_of(run)}}
