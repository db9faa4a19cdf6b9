-- Accepts a run: writes its record with its request, adds it to its session, and stores that its wake-up is sent. `input_text` is a digest.
-- `interrupts`: how it ends the run that works in its session when it enters it (`interrupt`, `rollback`), '' if it waits.
-- Returns `Submitted`. Events run.queued, run.scheduled, run.waiting_session.
--#include interrupt
--#include new_run
local known_digest = redis.call('HGET', k.run(run_id), 'digest')
if known_digest then
  if known_digest ~= digest then return reply{answer = 'CONFLICT'} end
  local at = redis.call('HMGET', k.run(run_id), 'state', 'queue')
  local sent_us = redis.call('ZSCORE', k.sent(at[2] or ''), run_id)
  return reply{answer = 'SAME', state = at[1], queue = at[2], sent_us = sent_us and tonumber(sent_us) or nil}
end
local announcement = redis.call('HGET', k.agents(), agent_id)
if not announcement and redis.call('EXISTS', k.agents()) == 1 then
  local known_agents = redis.call('HKEYS', k.agents())
  table.sort(known_agents)
  return reply{answer = 'UNKNOWN_AGENT', known_agents = known_agents}
end
if reject_if_busy == 1 and (holder(session_id) or redis.call('ZCARD', k.session_queue(session_id)) > 0) then
  return reply{answer = 'BUSY', holder = redis.call('HGET', k.session(session_id), 'holder')}
end
if queue == '' then
  local announced = announcement and decoded(announcement)
  local own = announced and announced.queue
  queue = type(own) == 'string' and own or default_queue -- cjson decodes null to a value that is not nil
end

local run = new_run(run_id, {format = format, state = STATE.scheduled, queue = queue, agent = agent_id, session = session_id,
  parent = parent_run_id, digest = digest, uid = uid, request = request, canvas = canvas, tell = tell, durable = durable, input_digest = input_text,
  expires = expires_ms > 0 and digits(NOW_MS + expires_ms), lists = #lists > 0 and cjson.encode(lists), on_busy = interrupts ~= '' and interrupts},
  lists_of({agent = agent_id, session = session_id}, lists))
if delay_ms > 0 then
  local due = NOW_MS + (expires_ms > 0 and math.min(delay_ms, expires_ms) or delay_ms)
  redis.call('HSET', k.run(run_id), 'due', digits(due))
  redis.call('ZADD', k.due(), digits(due), run_id)
  append(run, {'run.scheduled', '{"due_at":"' .. iso(due) .. '","delay_ms":' .. digits(delay_ms) .. '}'})
  return reply{answer = 'NEW', state = STATE.scheduled, queue = queue}
end
local sent_us, also = nil, {}
for _, wake in ipairs(enter(run)) do -- also the head of the queue if the session was repaired, and interrupted runs
  if wake.run_id == run_id then sent_us = wake.sent_us else also[#also + 1] = wake end
end
return reply{answer = 'NEW', state = redis.call('HGET', k.run(run_id), 'state'), queue = queue, sent_us = sent_us, also = also}
