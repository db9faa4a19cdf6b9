--#include session
--#include parked
--#include children_usage
local RECIPIENT_MS = 86400000 -- a recipient that no worker has served for a day gets no further ends

local stop -- see below

local function add(wakes, more)
  for _, wake in ipairs(more) do wakes[#wakes + 1] = wake end
end

-- notified_parent(run, ending): if another run has delegated to this one, that run gets the result as a fact. Returns wake-ups.
-- `parent_life`: a result does not belong to a later life of the parent, unless it has asked for it again
local function notified_parent(run, ending)
  local call = run.parent_call
  if call == '' then return {} end
  local id, life, background = unpack(redis.call('HMGET', k.run(run.id), 'parent', 'parent_life', 'background'))
  redis.call('SREM', k.children(id), run.id)
  local parent = load(id)
  if not parent or TERMINAL[parent.state] or life ~= digits(parent.life) then return {} end
  append(parent, {'run.child_completed', '{"child_run_id":' .. q(run.id) .. ',"stop_reason":' .. q(ending.stop_reason)
    .. ',"call_id":' .. q(call) .. '}'})
  local kind = redis.call('TYPE', k.facts(id)).ok
  if background == '1' or kind ~= 'hash' and kind ~= 'none' then return {} end -- of a wrong type: the parent fails when it is claimed
  return (store_fact(parent, FACT.child .. call, ending.result))
end

-- Children that must end. A run may have 1,000 children, each of these as many, and so on: one call of a script ends some of them, and `wake`
-- continues. Until then they are in a set of their own, `stopping_children`. Its name is also in the list `stopping`: the life in which the run ended,
-- whether its children in the background must end (1), and its id.
local MOST_STOPPED = 100 -- children that one call of a script ends or asks to end: some ten milliseconds
local stops_left, to_stop, is_stopping = MOST_STOPPED, {}, false

-- left_alone(id, parent): a child in the background goes on. If the parent is cancelled in a later life, it ends
local function left_alone(id, parent)
  local run = load(parent)
  redis.call('SADD', k.children(parent), id)
  if not run or TERMINAL[run.state] then redis.call('PEXPIRE', k.children(parent), RUN_TTL_MS) end
end

-- stopped_child(id, life, all, parent): ends a child of this life of the parent, or of an earlier one. Returns wake-ups.
-- `parent_life` is newer if a later life of the parent has asked for the child; there is none if somebody else has resumed it
local function stopped_child(id, life, all, parent)
  local child = load(id)
  if not child or TERMINAL[child.state] then return {} end
  local background, parent_life = unpack(redis.call('HMGET', k.run(id), 'background', 'parent_life'))
  if (tonumber(parent_life) or math.huge) > life then return {} end
  if background == '1' and all == '0' then
    left_alone(id, parent)
    return {}
  end
  redis.call('HSET', k.run(id), 'parent_ended', '1')
  return stop(child, 'the run ' .. parent .. ', which delegated to it, has ended')
end

-- stopped_children(): ends children of the runs in `to_stop`, in this order, until the limit of this call. Returns wake-ups
local function stopped_children()
  local wakes = {}
  if is_stopping then return wakes end -- a child has ended: its children are the next ones
  is_stopping = true
  while to_stop[1] and stops_left > 0 do
    local entry = to_stop[1]
    local life, all, parent = string.match(entry, '^(%d+):([01]):(.*)$')
    local ids = parent and redis.call('SPOP', k.stopping_children(entry), stops_left) or {}
    stops_left = stops_left - #ids
    table.sort(ids)
    for _, id in ipairs(ids) do add(wakes, stopped_child(id, tonumber(life), all, parent)) end
    if redis.call('EXISTS', k.stopping_children(entry)) == 0 then
      redis.call('ZREM', k.stopping(), entry)
      table.remove(to_stop, 1)
    end
  end
  is_stopping = false
  return wakes
end

-- end_children(run, all): the children of a run that ends must end; those in the background only if `all`. Returns wake-ups
local function end_children(run, all)
  if redis.call('EXISTS', k.children(run.id)) == 0 then return {} end
  local entry = digits(run.life) .. ':' .. (all and '1' or '0') .. ':' .. run.id
  if redis.call('EXISTS', k.stopping_children(entry)) == 0 then
    redis.call('RENAME', k.children(run.id), k.stopping_children(entry))
    redis.call('PERSIST', k.stopping_children(entry))
  else
    for _, id in ipairs(redis.call('SMEMBERS', k.children(run.id))) do redis.call('SADD', k.stopping_children(entry), id) end
    redis.call('DEL', k.children(run.id))
  end
  redis.call('ZADD', k.stopping(), digits(NOW_MS), entry)
  to_stop[#to_stop + 1] = entry
  return stopped_children()
end

-- go_on_stopping(): ends children that earlier calls have left. Returns wake-ups
local function go_on_stopping()
  for _, entry in ipairs(redis.call('ZRANGE', k.stopping(), 0, MOST_STOPPED - 1)) do to_stop[#to_stop + 1] = entry end
  return stopped_children()
end

local HAS_JOB = 4 -- the format of a run that has started a job, see store/formats.py

-- open_jobs(run): the event for each job that goes on although its run ends. A worker cancels it; the end does not wait for that
local function open_jobs(run)
  local events = {}
  local names = run.format >= HAS_JOB and redis.pcall('HKEYS', k.facts(run.id)) or {}
  for _, name in ipairs(names.err and {} or names) do
    local call = string.match(name, '^' .. FACT.job .. '(.+)$')
    if call then
      events[#events + 1] = 'tool.background.abandoned'
      events[#events + 1] = '{"call_id":' .. q(call) .. '}'
    end
  end
  return events
end

local DELEGATES = 4 -- the format of a run that has delegated, or was delegated to, see store/formats.py

-- end_run(run, ending): ends a run; the only function that does. ending = {state, stop_reason, result, name, payload, completed,
-- keep_fence, in_hand, code, in_all}: result, payload, completed and in_all are JSON; name is the terminal event; code is that of the error in the
-- result. in_all is the usage in the result, if it has more than the run has recorded: children have used that. The record of the run shows it
-- until another life begins, which may get the results of these children.
-- Returns wake-ups to send.
-- If Celery must be notified of the end, the run stays in `sent` until `confirm_completion.lua` confirms the notification. in_hand: the caller notifies Celery
-- itself; otherwise a message is sent for this. In both cases, a message is sent again until the notification is confirmed.
local function end_run(run, ending)
  local key = k.run(run.id)
  redis.call('HSET', key, 'state', ending.state, 'result', ending.result, 'ended', digits(NOW_MS),
    'fence', ending.keep_fence and run.fence or next_fence(run), 'owner', '')
  if (ending.in_all or '') ~= '' then
    redis.call('HSET', key, 'usage_in_all', ending.in_all)
  elseif run.life > 1 then
    redis.call('HDEL', key, 'usage_in_all') -- a worker of a version that does not know it has begun this life
  end
  if (ending.code or '') ~= '' then redis.call('HSET', key, 'end_code', digits(run.life) .. ' ' .. ending.code) end -- lists read no results
  leave(run)
  redis.call('ZREM', k.due(), run.id)
  redis.call('ZREM', k.timeouts(), run.id)
  redis.call('ZREM', k.sent(run.queue), run.id)
  redis.call('ZREM', k.index(APPROVALS), run.id)
  local jobs = open_jobs(run)
  if #jobs > 0 then append(run, jobs) end
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
  local held, below, of_child = unpack(redis.call('HMGET', k.session(S), 'holder', 'below:' .. run.id, 'of_child'))
  local lender, next_run
  if held == run.id then
    if below then lender, next_run = given_back(S) end
    if not lender then next_run = promote(S) end
  else
    redis.call('ZREM', k.session_queue(S), run.id)
    next_run = repaired(S)
  end
  local is_free = held == run.id and not lender and not next_run -- `promote` has found nobody else in the session
  if next_run then wakes[#wakes + 1] = next_run end
  add(wakes, notified_parent(run, ending))
  lender = lender and not next_run and load(lender.id) -- the result may have woken it
  if lender then add(wakes, {begin_shared(lender)}) end
  add(wakes, end_children(run, ending.state == STATE.cancelled))

  for _, name in ipairs(keys_of(run.id)) do redis.call('PEXPIRE', name, RUN_TTL_MS) end
  if is_free or not next_run and is_unused(S) then
    local ttl_ms = of_child and math.min(RUN_TTL_MS, SESSION_TTL_MS) or SESSION_TTL_MS -- nobody else knows the id of a child's session
    for _, name in ipairs(kept_keys(S)) do redis.call('PEXPIRE', name, ttl_ms) end
  end
  return wakes
end

-- foreign_ending(…): an ending that is not decided by the owner of the run: without an answer, with the usage in the record
local function foreign_ending(run, state, stop_reason, code, message, hint)
  local in_all = run.format >= DELEGATES and usage_with_children(run) or nil
  local usage = in_all or decoded(run.usage) and run.usage or '{}'
  local details = '{"code":' .. q(code) .. ',"message":' .. q(message) .. ',"hint":' .. (hint and q(hint) or 'null')
    .. ',"retryable":false,"context":{"run_id":' .. q(run.id) .. ',"agent_id":' .. q(run.agent) .. ',"session_id":' .. q(run.session) .. '}}'
  local result = '{"run_id":' .. q(run.id) .. ',"stop_reason":' .. q(stop_reason) .. ',"usage":' .. usage .. ',"error_details":' .. details
    .. ',"metadata":{"agent_id":' .. q(run.agent) .. ',"session_id":' .. q(run.session) .. '}}'
  local ids = '"agent_id":' .. q(run.agent) .. ',"session_id":' .. q(run.session) .. ',"run_id":' .. q(run.id)
  local payload = '{' .. ids .. ',"error":' .. q(message) .. ',"error_details":' .. details .. '}'
  if state == STATE.cancelled then payload = '{' .. ids .. ',"reason":' .. q(message) .. '}' end
  return {state = state, stop_reason = stop_reason, result = result, name = 'run.' .. state, payload = payload, code = code,
    completed = '{' .. ids .. ',"stop_reason":' .. q(stop_reason) .. '}', in_all = in_all}
end

local function cancelled(run, reason, in_hand)
  local ending = foreign_ending(run, STATE.cancelled, 'cancelled', 'run.cancelled', reason ~= '' and reason or 'cancelled')
  ending.in_hand = in_hand
  return end_run(run, ending)
end

-- stop(run, reason): cancels a run. If a worker executes it, the worker is notified, and the run ends later. Returns wake-ups
function stop(run, reason)
  if run.owner == '' then return cancelled(run, reason) end
  if run.cancel ~= '1' then
    redis.call('HSET', k.run(run.id), 'cancel', '1', 'cancel_reason', reason)
    redis.call('SADD', k.worker_box(run.owner), run.id)
    append(run, {'run.cancel_requested', '{"reason":' .. q(reason) .. '}'})
  end
  redis.call('PUBLISH', k.notices(run.owner), run.id)
  return {}
end

-- expired(run): whether the run was not started before it expired
local function expired(run) return run.expires > 0 and run.expires <= NOW_MS and run.attempt == 0 end
