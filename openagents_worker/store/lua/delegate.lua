-- The owner of a run delegates: it creates a child run, or finds the one that it has created for this recorded call before. `call` is the id of the
-- call, `delegated` (JSON) is stored as a fact of the run until the record of the call replaces it. The child gets the queue of its agent, else that
-- of the run. `mode`: `isolated` and `forked`: in a session of its own, new or a copy of the session of the run. `shared`: in the session of the
-- run, while the run is parked. A child that was cancelled because an earlier life of the run had ended, or because the run had given it up, continues
-- in another life.
-- Returns `Delegated`. Events run.child_started; of the child run.queued or run.waiting_session, or run.resumed before it.
--#include end_run
--#include new_run
--#include session_copy
--#include revived
--#include held
local run = live(run_id, fence)
if not run then return reply{answer = 'FENCED'} end
if redis.call('LLEN', k.journal(run_id)) < stored then return reply{answer = 'MISPLACED'} end
needs(k.facts(run_id), 'hash')

local function is_over(child, parent_ended)
  if not TERMINAL[child.state] then return false end
  if child.state ~= STATE.cancelled or parent_ended ~= '1' then return true end
  return redis.call('EXISTS', k.journal(child.id)) == 0 and not may_begin_again(child)
end

local child, was_awaited = load(child_id), nil
if child then
  local parent, parent_call, parent_ended, result, parent_life = unpack(redis.call('HMGET', k.run(child_id), 'parent', 'parent_call', 'parent_ended',
    'result', 'parent_life'))
  was_awaited = parent_life
  if parent ~= run_id or parent_call ~= call then return reply{answer = 'CONFLICT'} end
  if is_over(child, parent_ended) then return reply{answer = 'ENDED', result = result} end
  if not TERMINAL[child.state] and parent_ended == '1' then return reply{answer = 'STOPPING'} end
  if TERMINAL[child.state] then needs(k.facts(child_id), 'hash') end
elseif run.cancel ~= '1' then
  local announcement = redis.call('HGET', k.agents(), agent_id)
  if not announcement and redis.call('EXISTS', k.agents()) == 1 then
    local known_agents = redis.call('HKEYS', k.agents())
    table.sort(known_agents)
    return reply{answer = 'UNKNOWN_AGENT', known_agents = known_agents}
  end
  local announced = announcement and decoded(announcement)
  local own = announced and announced.queue
  queue = type(own) == 'string' and own or run.queue -- cjson decodes null to a value that is not nil
end
if run.cancel == '1' then return reply{answer = 'CANCEL'} end
if not child and redis.call('SCARD', k.children(run_id)) >= max_children then return reply{answer = 'FULL'} end
local is_copy = not child and mode == 'forked' and not session_exists(session_id)
if is_copy then
  needs(k.transcript(run.session), 'list')
  needs(k.artifacts(run.session), 'list')
  needs(k.session_state(run.session), 'hash')
end

redis.call('HSET', k.run(run_id), 'format', math.max(run.format, format), 'emit_no', batch_no)
redis.call('HSET', k.facts(run_id), FACT.delegated .. call, delegated)
redis.call('SADD', k.children(run_id), child_id)
local life = digits(run.life)
if child and not TERMINAL[child.state] then
  redis.call('HSET', k.run(child_id), 'parent_life', life)
  if not was_awaited and child.state == STATE.waiting_session and is_lent_to(child_id) then -- somebody else has resumed it
    redis.call('ZADD', k.session_queue(child.session), digits(ordinal_of(child)), child_id)
  end
  return reply{answer = 'SAME', wakes = {child.state == STATE.queued and wake_of(child) or nil}}
end
append(run, {'run.child_started', '{"child_run_id":' .. q(child_id) .. ',"agent_id":' .. q(agent_id) .. ',"mode":' .. q(mode) .. ',"call_id":'
  .. q(call) .. (background == 1 and ',"background":true' or '') .. '}'})
local wake
if child then
  redis.call('HDEL', k.facts(run_id), FACT.child .. call) -- the result of its earlier life, if this life of the run has got it and given the child up
  wake = revived(child, redis.call('EXISTS', k.journal(child_id)) == 0, '', life)
else
  if is_copy then
    copy_session(run.session, session_id, redis.call('LLEN', k.transcript(run.session)), redis.call('LLEN', k.artifacts(run.session)))
    for _, id in ipairs(run.format >= HOLDS_TURNS and stack_of(run) or {}) do
      write_held(id, session_id)
      change_held_state(id, session_id)
    end
  end
  if mode ~= 'shared' then redis.call('HSET', k.session(session_id), 'of_child', run_id) end
  child = new_run(child_id, {format = format, state = STATE.queued, queue = queue, agent = agent_id, session = session_id, parent = run_id,
    digest = digest, uid = uid, request = request, canvas = canvas, tell = 1, durable = run.durable ~= '' and run.durable or 1,
    input_digest = input_text, lists = #lists > 0 and cjson.encode(lists), parent_call = call, parent_life = life, mode = mode,
    background = background == 1 and '1'}, lists_of({agent = agent_id, session = session_id}, lists))
  wake = place(child)
end
if mode ~= 'shared' then redis.call('ZREM', k.index(SESSIONS), session_id) end -- lists of sessions show those of producers
return reply{answer = 'NEW', wakes = {wake}}
