-- Accepts a run: writes its record with its request, adds it to its session, and stores that its wake-up is sent.
-- Returns NEW | SAME, state, queue, wake_us | CONFLICT | BUSY | UNKNOWN_AGENT, known ids. Events run.queued, run.scheduled, run.waiting_session.
--#include session
--#include new_run
local known_digest = redis.call('HGET', k.run(run_id), 'digest')
if known_digest then
  if known_digest ~= digest then return {'CONFLICT'} end
  local at = redis.call('HMGET', k.run(run_id), 'state', 'queue')
  return {'SAME', at[1] or '', at[2] or '', redis.call('ZSCORE', k.sent(at[2] or ''), run_id) or ''}
end
local announcement = redis.call('HGET', k.agents(), agent_id)
if not announcement and redis.call('EXISTS', k.agents()) == 1 then
  local answer = {'UNKNOWN_AGENT'} -- not with `unpack`, which is limited to a few thousand values
  for _, id in ipairs(redis.call('HKEYS', k.agents())) do answer[#answer + 1] = id end
  return answer
end
if reject_if_busy == 1 and (holder(session_id) or redis.call('ZCARD', k.session_queue(session_id)) > 0) then
  return {'BUSY', redis.call('HGET', k.session(session_id), 'holder') or ''}
end
if queue == '' then
  local announced = announcement and decoded(announcement)
  local own = announced and announced.queue
  queue = type(own) == 'string' and own or default_queue -- cjson decodes null to a value that is not nil
end

local run = new_run(run_id, {format = format, state = STATE.scheduled, queue = queue, agent = agent_id, session = session_id,
  parent = parent_run_id, digest = digest, uid = uid, request = request, canvas = canvas, tell = tell, durable = durable,
  expires = expires_ms > 0 and digits(NOW_MS + expires_ms), lists = #lists > 0 and cjson.encode(lists)},
  lists_of({agent = agent_id, session = session_id}, lists))
if delay_ms > 0 then
  local due = NOW_MS + (expires_ms > 0 and math.min(delay_ms, expires_ms) or delay_ms)
  redis.call('HSET', k.run(run_id), 'due', digits(due))
  redis.call('ZADD', k.due(), digits(due), run_id)
  append(run, {'run.scheduled', '{"due_at":"' .. iso(due) .. '","delay_ms":' .. digits(delay_ms) .. '}'})
  return {'NEW', STATE.scheduled, queue, ''}
end
local wake = place(run)
local state = redis.call('HGET', k.run(run_id), 'state')
if wake and wake[1] == run_id then return {'NEW', state, queue, wake[3]} end
return {'NEW', state, queue, '', wake} -- the session was repaired: the head of its queue must be woken
