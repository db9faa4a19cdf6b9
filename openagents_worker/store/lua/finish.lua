-- The owner ends a run: writes result, transcript, artifacts, session state, terminal and final event, and passes the session to the next run.
-- A shared child writes nothing to the session: its parent holds its turn (lib/held.lua). A run that leaves a turn writes what it holds before it.
-- A summary replaces the first `compacted` messages of the transcript for later runs, if no other run has done so since this one began (`epoch`
-- is the number of the new summary). Workers that do not know summaries leave the session to others.
-- All of it or nothing is written. CANCEL: the run is rolled back, so it must not complete. Returns `WriteResult`. Repeating the call with the same fence returns OK.
--#include end_run
--#include held
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
local leaves_turn = end_state == STATE.completed or #transcript > 0
local is_lent = run.format >= DELEGATES and is_lent_to(run_id)
local holds = run.format >= HOLDS_TURNS and leaves_turn
if not is_lent then
  if holds or #transcript > 0 then needs(k.transcript(S), 'list') end
  if holds or #artifacts > 0 then needs(k.artifacts(S), 'list') end
  if #state + #state_removed > 0 then needs(k.session_state(S), 'hash') end
end
redis.call('HSET', k.run(run_id), 'usage', usage, 'emit_no', batch_no)
append(run, events)
if format > run.format then redis.call('HSET', k.run(run_id), 'format', format) end

-- turn(): what the run leaves in its session, as items of the list `held`
local function turn()
  local items = {}
  for _, message in ipairs(transcript) do items[#items + 1] = 'm' .. message end
  for _, artifact in ipairs(artifacts) do items[#items + 1] = 'a' .. artifact end
  for i, part in ipairs(state) do items[#items + 1] = (i % 2 == 1 and 's' or 'v') .. part end
  for _, name in ipairs(state_removed) do items[#items + 1] = 'g' .. name end
  return items
end

-- write_turn(): writes what the run leaves in its session, after what it holds
local function write_turn()
  if holds then write_held(run_id, S) end
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
end

if not is_lent then
  write_turn()
elseif leaves_turn then
  hold(run, turn())
end
if holds then held_is_written(run_id) end
return reply{answer = 'OK', wakes = end_run(run, {state = end_state, stop_reason = stop_reason, result = result, name = event, payload = payload, completed = completed,
  keep_fence = true, in_hand = true, code = code, in_all = usage_in_all})}
