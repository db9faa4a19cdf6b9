-- A worker claims a run. This decides atomically whether the run must be executed: a message is only a wake-up.
-- Only a run in the state `queued` is executed. In all other states the answer is PARKED, or the run waits.
-- Returns `Claimed`. If Celery was not notified of the end of the run yet, the answer DONE has the result. Event run.attempt_started.
-- The worker reads the formats `oldest` to `newest`. Its message has `message_format`. A run in another format is left to other workers: it is
--   due again after some time. There is one event run.left_to_others for each pair of formats, however often the run is claimed. After
--   left_max_ms, the run fails with agent.unavailable.
--#include interrupt
--#include journal
--#include suspects
--#include left
--#include held
-- needed_by(run): the data without which the run cannot be executed, read before the first write. If a key has a wrong type: nil, the key,
-- and the type that it must have
local function needed_by(run)
  local S = run.session
  local keys = {journal = k.journal(run_id), messages = k.transcript(S), artifacts = k.artifacts(S), state = k.session_state(S),
    facts = k.facts(run_id)}
  local found = {journal = redis.pcall('LLEN', keys.journal), messages = redis.pcall('LLEN', keys.messages),
    artifacts = redis.pcall('LLEN', keys.artifacts), state = redis.pcall('HGETALL', keys.state), facts = redis.pcall('HKEYS', keys.facts)}
  for name, answer in pairs(found) do
    if is_wrong_type(answer) then return nil, keys[name], (name == 'state' or name == 'facts') and 'hash' or 'list' end
  end
  return found
end

-- summary_of(S): the summary that stands for the first messages of the transcript: its number, their count and its text
local function summary_of(S)
  local epoch = epoch_of(S)
  if epoch == 0 then return 0, 0, '' end
  local found = redis.call('HMGET', k.session(S), 'compacted:' .. digits(epoch), 'compaction:' .. digits(epoch))
  return epoch, count_of(found[1]), found[2] or ''
end

-- small_facts(names): the facts of the run; nil if they are larger than a page: the results of many children may be
local function small_facts(names)
  local bytes = 0
  for _, name in ipairs(names) do
    bytes = bytes + #name + redis.call('HSTRLEN', k.facts(run_id), name)
    if bytes > page_bytes then return nil end
  end
  return #names > 0 and redis.call('HGETALL', k.facts(run_id)) or names
end

-- held_by_stack(run): what the runs hold that have lent the session, the lowest one first, and the run itself: id, first position, end, id, …
local function held_by_stack(run)
  local found = {}
  for _, id in ipairs(stack_of(run)) do
    local from, to = held_range(id)
    if to > 0 then
      for _, part in ipairs({id, digits(from), digits(to)}) do found[#found + 1] = part end
    end
  end
  return found
end

local function claimed(run, found)
  local epoch, compacted, compaction = summary_of(run.session)
  local page = records(k.journal(run_id), 0, found.journal, page_bytes, 0)
  local state_bytes = 0
  for _, text in ipairs(found.state) do state_bytes = state_bytes + #text end
  local request, last_error, facts_no, seeds = unpack(redis.call('HMGET', k.run(run_id), 'request', 'last_error', 'facts_no', 'seeds'))
  return reply{answer = 'CLAIMED', fence = run.fence, request = request, attempt = run.attempt, life = run.life, retries = run.retries,
    recoveries = run.recoveries, uid = run.uid, usage = run.usage, queue = run.queue, canvas = run.canvas, last_error = last_error,
    active_ms = count_of(run.active_ms), durable = run.durable ~= '0', facts = small_facts(found.facts), facts_no = whole(facts_no), now_ms = digits(NOW_MS),
    journal_length = found.journal,
    journal = page, messages = found.messages, artifacts = found.artifacts,
    seeds = seeds or '', is_interrupted = says_so_itself(run), epoch = epoch, compacted = compacted, compaction = compaction, held = run.format >= HOLDS_TURNS and held_by_stack(run) or {},
    session_state = state_bytes <= page_bytes and found.state or nil} -- the worker reads larger ones separately
end

local function later(run, delay_ms)
  local due = NOW_MS + delay_ms
  if run.expires > 0 and run.attempt == 0 then due = math.min(due, run.expires) end
  redis.call('HSET', k.run(run_id), 'state', STATE.retrying, 'due', digits(due))
  redis.call('ZADD', k.due(), digits(due), run_id)
  redis.call('ZREM', k.sent(run.queue), run_id)
end

-- has_lent_to(R, run): whether the run is below the holder R, so that `given_back` wakes it: no message of it must be sent again until then
local function has_lent_to(R, run)
  if R == run_id then return false end
  for _, id in ipairs(stack_of({id = R, session = run.session})) do
    if id == run_id then return true end
  end
  return false
end

local function is_read(format) return format >= oldest and format <= newest end

local run = load(run_id)
if not run then return reply{answer = 'UNKNOWN'} end
if TERMINAL[run.state] then
  local at = redis.call('HMGET', k.run(run_id), 'untold', 'result')
  if at[1] and not is_read(run.format) then return reply{answer = 'OTHER_FORMAT'} end -- a worker that can read the result notifies Celery
  local result = at[1] and (at[2] and at[2] ~= '' and at[2] or 'null') or '' -- null: the result is lost
  return reply{answer = 'DONE', state = run.state, life = run.life, unnotified_result = result}
end
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS then return reply{answer = 'NOT_ALIVE'} end
if run.owner ~= '' then
  if run.owner == incarnation and string.match(run.fence, ':(.*)$') == nonce then
    local needed, wrong = needed_by(run)
    return needed and claimed(run, needed) or aside().fail(wrong)
  end
  return reply{answer = 'BUSY'}
end
if run.cancel == '1' and not says_so_itself(run) then return reply{answer = 'CANCELLED', wakes = cancelled(run, run.cancel_reason, true), life = run.life} end
if expired(run) then return reply{answer = 'CANCELLED', wakes = cancelled(run, 'expired', true), life = run.life} end
local wakes = {}
if HAS_DUE[run.state] then
  if run.due > NOW_MS then return reply{answer = 'NOT_DUE'} end
  redis.call('ZREM', k.due(), run_id)
  for _, wake in ipairs(run.state == STATE.scheduled and enter(run) or {}) do
    if wake.run_id ~= run_id then wakes[#wakes + 1] = wake end
  end
  run.state = STATE.queued
end
local held_by = holder(run.session, run_id)
if not held_by then -- the record of the holder is deleted: this claim repairs the session
  local lost = redis.call('HGET', k.session(run.session), 'holder')
  local is_stack = lost and redis.call('HEXISTS', k.session(run.session), 'below:' .. lost) == 1
  if is_stack or redis.call('ZSCORE', k.session_queue(run.session), run_id) then
    local wake = passed_on(run.session) -- the run below it or the head of the queue is next, even if this is another run
    held_by = redis.call('HGET', k.session(run.session), 'holder')
    if wake and wake.run_id == run_id then run.state = STATE.queued else wakes[#wakes + 1] = wake end
  end
  if not held_by then
    redis.call('HSET', k.session(run.session), 'holder', run_id)
    held_by = run_id
  end
end
if has_lent_to(held_by, run) then redis.call('ZREM', k.sent(run.queue), run_id) end -- it is woken when it gets the session back
if held_by ~= run_id then return reply{answer = 'WAITING', wakes = wakes} end
local format = math.max(run.format, session_format(run.session), message_format)
if not (is_read(run.format) and is_read(format)) then
  if run.state ~= STATE.queued or says_so_itself(run) then return reply{answer = 'OTHER_FORMAT'} end -- it is woken later
  local delay_ms = left_again_in(run, left_max_ms)
  if not delay_ms then
    local ending = foreign_ending(run, STATE.failed, 'failed', 'agent.unavailable',
      'no worker that can read format ' .. digits(format) .. ' of the run was available in time', 'start a worker of the version that wrote the run')
    ending.in_hand = true
    return reply{answer = 'DONE', state = STATE.failed, life = run.life, unnotified_result = ending.result, wakes = end_run(run, ending)}
  end
  if redis.call('HSETNX', k.run(run_id), 'left:' .. format .. ':' .. newest, incarnation) == 1 then
    append(run, {'run.left_to_others', '{"format":' .. digits(format) .. ',"newest_read":' .. digits(newest)
      .. ',"left_by":' .. q(incarnation) .. ',"delay_ms":' .. digits(delay_ms) .. '}'})
  end
  later(run, delay_ms)
  return reply{answer = 'OTHER_FORMAT'}
end
if run.state ~= STATE.queued then return reply{answer = 'PARKED', state = run.state} end
local needed, wrong, kind = needed_by(run)
if not needed then
  local A = aside()
  local found = A.type_of(wrong)
  A.note(wrong, 'redis.wrong_type', 'the key is a ' .. found .. ' and must be a ' .. kind .. ': runs that need it fail')
  local ending = foreign_ending(run, STATE.failed, 'failed', 'redis.wrong_type', 'the key ' .. wrong .. ' is a ' .. found
    .. ' and must be a ' .. kind, 'another program may have written it; openagents-worker status lists such keys')
  ending.in_hand = true
  return reply{answer = 'DONE', state = STATE.failed, life = run.life, unnotified_result = run.tell == '1' and ending.result or '',
    wakes = end_run(run, ending)}
end
local held = suspicion_of(run)
local delay_ms = busy_ms(run, held, incarnation)
if delay_ms then
  if not says_so_itself(run) then later(run, delay_ms) end -- if nobody executes it, it is ended by force
  return reply{answer = 'SUSPECT_BUSY'}
end
if held.group ~= '' then begins(run, held, incarnation) end

run.fence = next_fence(run, nonce)
run.attempt = run.attempt + 1
run.owner = incarnation
redis.call('HSET', k.run(run_id), 'state', STATE.running, 'fence', run.fence, 'owner', incarnation, 'attempt', run.attempt, 'emit_no', 0,
  'started', run.started ~= '' and run.started or digits(NOW_MS), 'claimed', digits(NOW_MS),
  'claimed_at', run.attempt .. ':' .. digits(needed.journal))
redis.call('SADD', k.worker_runs(incarnation), run_id)
redis.call('ZREM', k.sent(run.queue), run_id)
if run.force_at == 0 then redis.call('ZREM', k.due(), run_id) end
append(run, {'run.attempt_started', '{"attempt":' .. run.attempt .. ',"checkpoint_id":'
  .. (needed.journal > 0 and q(run_id .. ':step:' .. digits(run.steps)) or 'null') .. '}'})
return claimed(run, needed)
