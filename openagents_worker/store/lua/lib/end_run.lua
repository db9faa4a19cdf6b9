--#include session
-- end_run(run, ending): the one way a run ends. ending = {state, stop_reason, result, name, payload, completed,
-- keep_fence, in_hand}: result, payload and completed are JSON; name is the terminal event. Returns wake-ups to send.
-- A run whose end is to be told to Celery stays among the sent ones until it has been told (told.lua). in_hand: whoever
-- ends it is about to tell, else a message of its own is sent for it; both are sent again when nobody has.
local function end_run(run, ending)
  local key = k.run(run.id)
  redis.call('HSET', key, 'state', ending.state, 'result', ending.result, 'ended', digits(NOW_MS),
    'fence', ending.keep_fence and run.fence or next_fence(run), 'owner', '')
  leave(run)
  redis.call('ZREM', k.due(), run.id)
  redis.call('ZREM', k.sent(run.queue), run.id)
  append(run, {ending.name, ending.payload, 'session.run.completed', ending.completed}, true)

  local wakes = {}
  if run.tell == '1' then
    redis.call('HSET', key, 'untold', '1', 'tellings', 0)
    local wake = wake_of(run)
    wake[9] = 'ended'
    if not ending.in_hand then wakes[1] = wake end
  end
  local S = run.session
  if redis.call('HGET', k.session(S), 'holder') == run.id then
    local next_run = promote(S)
    if next_run then wakes[#wakes + 1] = next_run end
  else
    redis.call('ZREM', k.session_queue(S), run.id)
  end
  local head = repaired(S)
  if head then wakes[#wakes + 1] = head end

  for _, name in ipairs({key, k.facts(run.id), k.events(run.id), k.journal(run.id)}) do redis.call('PEXPIRE', name, RUN_TTL_MS) end
  if redis.call('HEXISTS', k.session(S), 'holder') == 0 and redis.call('ZCARD', k.session_queue(S)) == 0 then
    for _, name in ipairs(session_keys(S)) do redis.call('PEXPIRE', name, SESSION_TTL_MS) end
  end
  return wakes
end

-- An ending decided by somebody who does not run the run: no answer, the usage the record knows
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

-- expired(run): it was to be started by a time that is over, and nobody has
local function expired(run) return run.expires > 0 and run.expires <= NOW_MS and run.attempt == 0 end
