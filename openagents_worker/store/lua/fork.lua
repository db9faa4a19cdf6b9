-- Creates a run that continues from a checkpoint of another run. Its journal is a copy of the records up to `steps`, so none of these calls is made
-- again. Facts are not copied: a later approval does not hold for it, and a call that has begun is not known to it.
-- In another session than that of the source, it creates this session, with the first `messages` and `artifacts` of the source's session: what there
-- was when the source began. The field `seeds` names the runs from which its records are copied. `input_text` is a digest.
-- Returns `Forked`. Events run.forked, then run.queued or run.waiting_session.
-- Of what shared children have left with the source, the fork holds the first `held_to` items, the last of which is that of the call `held_call`.
-- `above` are the held turns that the source itself saw when it began: the id of a run, the first position, the one behind the last, the next id, …
--#include session_copy
--#include new_run
--#include held
local known_digest = redis.call('HGET', k.run(run_id), 'digest')
if known_digest then
  if known_digest ~= digest then return reply{answer = 'CONFLICT'} end
  local at = redis.call('HMGET', k.run(run_id), 'state', 'queue')
  local sent_us = redis.call('ZSCORE', k.sent(at[2] or ''), run_id)
  return reply{answer = 'SAME', state = at[1], queue = at[2], sent_us = sent_us and tonumber(sent_us) or nil}
end
local source = load(from_run_id)
if not source then return reply{answer = 'UNKNOWN'} end
needs(k.journal(from_run_id), 'list')
needs(k.facts(from_run_id), 'hash')
local length = journal_length(from_run_id)
if length == 0 then return reply{answer = 'NO_CHECKPOINT'} end
if steps >= length then return reply{answer = 'OTHER_CHECKPOINT', detail = from_run_id .. ':step:' .. digits(length - 1)} end
for i = 1, #above, 3 do
  needs(k.held(above[i]), 'list')
  if redis.call('LLEN', k.held(above[i])) < tonumber(above[i + 2]) then return reply{answer = 'HELD_EXPIRED', detail = above[i]} end
end
needs(k.held(from_run_id), 'list')
local holds = held_to > 0 and redis.call('LINDEX', k.held(from_run_id), held_to - 1) == 't' .. held_call
local is_new_session = session_id ~= source.session
if is_new_session then
  if session_exists(session_id) then return reply{answer = 'SESSION_EXISTS'} end
  needs(k.transcript(source.session), 'list')
  needs(k.artifacts(source.session), 'list')
  needs(k.session_state(source.session), 'hash')
end

redis.call('COPY', k.journal(from_run_id), k.journal(run_id), 'REPLACE')
redis.call('LTRIM', k.journal(run_id), 0, steps)
redis.call('PERSIST', k.journal(run_id))
if is_new_session then
  copy_session(source.session, session_id, messages, artifacts)
  for i = 1, #above, 3 do
    local id, to = above[i], tonumber(above[i + 2])
    if to > (held_range(id)) then change_held_state(id, session_id, to) end -- else the state of the session has them
    write_held(id, session_id, tonumber(above[i + 1]), to)
  end
end
if holds then
  keep_first(k.held(from_run_id), k.held(run_id), held_to)
  redis.call('PERSIST', k.held(run_id))
end
local checkpoint_id = from_run_id .. ':step:' .. digits(steps)
local run = new_run(run_id, {format = source.format, state = STATE.queued, queue = source.queue, agent = source.agent, session = session_id,
  parent = '', digest = digest, uid = uid, request = request, canvas = '', tell = tell, durable = source.durable ~= '' and source.durable or 1,
  input_digest = input_text, lists = #lists > 0 and cjson.encode(lists), forked_from = checkpoint_id,
  seeds = (field_of(from_run_id, 'seeds') or '') .. digits(steps) .. ' ' .. source.uid .. ' ' .. from_run_id .. '\n'},
  lists_of({agent = source.agent, session = session_id}, lists))
redis.call('HSET', k.run(run_id), 'steps', digits(steps))
run.steps = steps
local dropped = {}
for _, fact in ipairs(redis.call('HKEYS', k.facts(from_run_id))) do
  local call = string.match(fact, '^' .. FACT.intent .. '(.+)$')
  if call then dropped[#dropped + 1] = q(call) end
end
table.sort(dropped)
append(run, {'run.forked', '{"from_run_id":' .. q(from_run_id) .. ',"checkpoint_id":' .. q(checkpoint_id)
  .. (#dropped > 0 and ',"dropped_intents":[' .. table.concat(dropped, ',') .. ']' or '') .. '}'})
local wake = place(run)
local is_own = wake and wake.run_id == run_id -- else the session was repaired: the head of its queue must be woken
return reply{answer = 'NEW', state = redis.call('HGET', k.run(run_id), 'state'), queue = run.queue, sent_us = is_own and wake.sent_us or nil,
  also = wake and not is_own and {wake} or {}}
