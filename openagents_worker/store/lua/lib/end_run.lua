--#include session
local RECIPIENT_MS = 86400000 -- a recipient that no worker has served for a day gets no further ends

-- end_run(run, ending): ends a run; the only function that does. ending = {state, stop_reason, result, name, payload, completed,
-- keep_fence, in_hand}: result, payload and completed are JSON; name is the terminal event. Returns wake-ups to send.
-- If Celery must be notified of the end, the run stays in `sent` until `confirm_completion.lua` confirms the notification. in_hand: the caller notifies Celery
-- itself; otherwise a message is sent for this. In both cases, a message is sent again until the notification is confirmed.
local function end_run(run, ending)
  local key = k.run(run.id)
  redis.call('HSET', key, 'state', ending.state, 'result', ending.result, 'ended', digits(NOW_MS),
    'fence', ending.keep_fence and run.fence or next_fence(run), 'owner', '')
  leave(run)
  redis.call('ZREM', k.due(), run.id)
  redis.call('ZREM', k.timeouts(), run.id)
  redis.call('ZREM', k.sent(run.queue), run.id)
  redis.call('ZREM', k.index(APPROVALS), run.id)
  append(run, {ending.name, ending.payload, 'session.run.completed', ending.completed}, true)

  local wakes = {}
  if run.tell == '1' then
    redis.call('HSET', key, 'untold', '1', 'tellings', 0)
    local wake = wake_of(run)
    wake.is_ended = true
    if not ending.in_hand then wakes[1] = wake end
  end
  -- Celery is notified by a message of the run, and other recipients by the outbox of a worker
  for _, recipient in ipairs(redis.call('ZRANGEBYSCORE', k.recipients(), digits(NOW_MS - RECIPIENT_MS), '+inf')) do
    redis.call('ZADD', k.outbox(recipient), digits(NOW_MS), digits(run.life) .. ':' .. run.id)
    redis.call('PEXPIRE', k.outbox(recipient), RUN_TTL_MS)
  end
  local S = run.session
  if redis.call('HGET', k.session(S), 'holder') == run.id then
    local next_run = promote(S)
    if next_run then wakes[#wakes + 1] = next_run end
  else
    redis.call('ZREM', k.session_queue(S), run.id)
    local head = repaired(S)
    if head then wakes[#wakes + 1] = head end
  end

  for _, name in ipairs(keys_of(run.id)) do redis.call('PEXPIRE', name, RUN_TTL_MS) end
  if redis.call('HEXISTS', k.session(S), 'holder') == 0 and redis.call('ZCARD', k.session_queue(S)) == 0 then
    for _, name in ipairs(session_keys(S)) do redis.call('PEXPIRE', name, SESSION_TTL_MS) end
  end
  return wakes
end

-- foreign_ending(…): an ending that is not decided by the owner of the run: without an answer, with the usage in the record
local function foreign_ending(run, state, stop_reason, code, message, hint)
  local usage = decoded(run.usage) and run.usage or '{}'
  local details = '{"code":' .. q(code) .. ',"message":' .. q(message) .. ',"hint":' .. (hint and q(hint) or 'null')
    .. ',"retryable":false,"context":{"run_id":' .. q(run.id) .. ',"agent_id":' .. q(run.agent) .. ',"session_id":' .. q(run.session) .. '}}'
  local result = '{"run_id":' .. q(run.id) .. ',"stop_reason":' .. q(stop_reason) .. ',"usage":' .. usage .. ',"error_details":' .. details
    .. ',"metadata":{"agent_id":' .. q(run.agent) .. ',"session_id":' .. q(run.session) .. '}}'
  local ids = '"agent_id":' .. q(run.agent) .. ',"session_id":' .. q(run.session) .. ',"run_id":' .. q(run.id)
  local payload = '{' .. ids .. ',"error":' .. q(message) .. ',"error_details":' .. details .. '}'
  if state == STATE.cancelled then payload = '{' .. ids .. ',"reason":' .. q(message) .. '}' end
  return {state = state, result = result, name = 'run.' .. state, payload = payload,
    completed = '{' .. ids .. ',"stop_reason":' .. q(stop_reason) .. '}'}
end

local function cancelled(run, reason, in_hand)
  local ending = foreign_ending(run, STATE.cancelled, 'cancelled', 'run.cancelled', reason ~= '' and reason or 'cancelled')
  ending.in_hand = in_hand
  return end_run(run, ending)
end

-- expired(run): whether the run was not started before it expired
local function expired(run) return run.expires > 0 and run.expires <= NOW_MS and run.attempt == 0 end
