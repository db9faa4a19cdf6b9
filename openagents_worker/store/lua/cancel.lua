-- Cancels a run. If a worker executes it, the worker is notified. Otherwise, or with `force`, the run ends immediately.
-- Returns `Cancelled`. Event run.cancel_requested or the terminal events.
-- `transcript`: what a run that was interrupted leaves in its session, if it is ended by force. What it holds for its shared
-- children is written before it.
-- `given_up_in`: the run that has delegated to this one does not wait for it any more, in this life. If it asks for it again, this run continues. A
-- later life of that run may have done so already: then the answer is ALREADY, and nothing is cancelled.
-- `overdue` = 1: only a run that was interrupted and has not ended in time; for any other one the answer is ALREADY. Between the script that has
-- found it overdue and this one, the run may have ended and begun another life.
--#include end_run
--#include held
local run = load(run_id)
if not run then return reply{answer = 'UNKNOWN'} end
if TERMINAL[run.state] then return reply{answer = 'ALREADY', state = run.state} end
if overdue == 1 and (run.force_at == 0 or run.force_at > NOW_MS) then return reply{answer = 'ALREADY', state = run.state} end
if given_up_in > 0 then
  if field_of(run_id, 'parent_life') ~= digits(given_up_in) then return reply{answer = 'ALREADY', state = run.state} end
  if run.cancel ~= '1' then redis.call('HSET', k.run(run_id), 'parent_ended', '1') end -- else somebody else has cancelled it
end
if says_so_itself(run) and run.owner == '' and force == 0 then return reply{answer = 'REQUESTED'} end
if run.owner ~= '' and force == 0 then
  stop(run, reason)
  return reply{answer = 'REQUESTED'}
end
if #transcript > 0 and says_so_itself(run) and redis.call('HGET', k.session(run.session), 'holder') == run_id then
  needs(k.transcript(run.session), 'list')
  if run.format >= HOLDS_TURNS then
    needs(k.artifacts(run.session), 'list')
    write_held(run_id, run.session)
    held_is_written(run_id)
  end
  for _, message in ipairs(transcript) do redis.call('RPUSH', k.transcript(run.session), message) end
end
return reply{answer = 'CANCELLED', wakes = cancelled(run, says_so_itself(run) and run.cancel_reason or reason)}
