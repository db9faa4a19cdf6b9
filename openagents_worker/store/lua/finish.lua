-- The owner ends a run: writes result, transcript, artifacts, session state, terminal and final event, and passes the session to the next run.
-- A summary replaces the first `compacted` messages of the transcript for later runs, if no other run has done so since this one began (`epoch`
-- is the number of the new summary). Workers that do not know summaries leave the session to others.
-- All of it or nothing is written. CANCEL: the run is rolled back, so it must not complete. Returns `WriteResult`. Repeating the call with the same fence returns OK.
--#include end_run
local run = load(run_id)
if run and run.fence == fence and TERMINAL[run.state] then return reply{answer = 'OK'} end
if not is_live(run, fence) then return reply{answer = 'FENCED'} end
local S = run.session
if run.interrupted == 'rollback' and end_state == STATE.completed then -- the caller must end it as cancelled
  if batch_no > run.emit_no then
    redis.call('HSET', k.run(run_id), 'usage', usage, 'emit_no', batch_no)
    append(run, events)
  end
  return reply{answer = 'CANCEL'}
end
if #transcript > 0 then needs(k.transcript(S), 'list') end
if #artifacts > 0 then needs(k.artifacts(S), 'list') end
if #state + #state_removed > 0 then needs(k.session_state(S), 'hash') end
redis.call('HSET', k.run(run_id), 'usage', usage, 'emit_no', batch_no)
append(run, events)
if format > run.format then redis.call('HSET', k.run(run_id), 'format', format) end
for _, message in ipairs(transcript) do redis.call('RPUSH', k.transcript(S), message) end
for _, artifact in ipairs(artifacts) do redis.call('RPUSH', k.artifacts(S), artifact) end
for i = 1, #state, 2 do redis.call('HSET', k.session_state(S), state[i], state[i + 1]) end -- key, JSON, key, JSON, …
for _, name in ipairs(state_removed) do redis.call('HDEL', k.session_state(S), name) end
if epoch > 0 and epoch_of(S) == epoch - 1 then
  redis.call('HSET', k.session(S), 'epoch', digits(epoch), 'compacted:' .. digits(epoch), digits(compacted), 'compaction:' .. digits(epoch), compaction)
  format = math.max(format, compacted_format)
end
count_up(k.session(S), 'version')
if format > session_format(S) then redis.call('HSET', k.session(S), 'format', digits(format)) end
return reply{answer = 'OK', wakes = end_run(run, {state = end_state, stop_reason = stop_reason, result = result, name = event, payload = payload, completed = completed,
  keep_fence = true, in_hand = true, code = code})}
