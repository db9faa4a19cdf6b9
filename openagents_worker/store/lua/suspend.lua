-- The owner suspends a run. kind: `retry`: due after delay_ms. `handover`: another worker continues it immediately. `left_to_others`: for a worker
-- that can execute it, due after increasing times, of which delay_ms is the first (0: 5 s). `park`: it waits for facts (`waits`, JSON) in the
-- state `park_state`, and at most until due_ms (0: for ever); waiting_payload is that of run.waiting. If a fact is newer than `facts_seen`, the
-- run is not parked but continues immediately, and its next attempt gets the fact. `acknowledged` is the number of the last batch of writes that the
-- owner knows to be stored; MISPLACED: Redis has lost it, and perhaps the question, the child or the intent that the run would wait for.
-- `facts` (name, value, name, value …) are written with it, `closed` (names) are deleted. With `limit`, it gets a place in the queue of this
-- limit of the fleet.
-- Returns `WriteResult`. OVERDUE: it was left to others for left_max_ms; nothing is written.
-- Events: those in `events`, then run.retry_scheduled, run.handed_over, run.waiting or (once) run.left_to_others.
--#include limits
--#include records
--#include left
--#include session
local run = live(run_id, fence)
if not run then return reply{answer = 'FENCED'} end
if run.cancel == '1' then return reply{answer = 'CANCEL'} end
if call ~= '' or #facts + #closed > 0 then needs(k.facts(run_id), 'hash') end
if kind == 'park' and run.emit_no < acknowledged then return reply{answer = 'MISPLACED'} end
if kind == 'park' and not PARKED[park_state] then return redis.error_reply('ERR a run cannot be parked in the state ' .. park_state) end
local at = {'fence', next_fence(run), 'owner', '', 'emit_no', batch_no}
local wakes = {}
local is_queued = kind == 'handover' or (kind == 'park' and whole(field_of(run_id, 'facts_no')) ~= facts_seen)

local function queue_again()
  redis.call('HSET', k.run(run_id), 'state', STATE.queued, unpack(at))
  events[#events + 1] = 'run.handed_over'
  events[#events + 1] = '{"checkpoint_id":' .. q(run_id .. ':step:' .. digits(run.steps)) .. '}'
end

local function park()
  redis.call('HSET', k.run(run_id), 'state', park_state, 'waits', waits, 'format', math.max(run.format, format), unpack(at))
  if due_ms > 0 then
    redis.call('HSET', k.run(run_id), 'due', digits(due_ms))
    redis.call('ZADD', k.timeouts(), digits(due_ms), run_id)
  else
    redis.call('HDEL', k.run(run_id), 'due')
  end
  if limit ~= '' then
    redis.call('HSET', k.run(run_id), 'queued_at', at[2] .. ' ' .. limit)
    enqueue(limit, tenant, run_id)
  end
  run.state = park_state
  events[#events + 1] = 'run.waiting'
  events[#events + 1] = waiting_payload
end

local function put_off()
  local due = NOW_MS + delay_ms
  redis.call('HSET', k.run(run_id), 'state', STATE.retrying, 'due', digits(due), 'last_error', error_code, 'last_error_details', error_details,
    unpack(at))
  redis.call('ZADD', k.due(), digits(due), run_id)
  return due
end

if is_queued then
  queue_again()
elseif kind == 'park' then
  park()
elseif kind == 'retry' then
  redis.call('HSET', k.run(run_id), 'retries', run.retries + 1) -- since the last record; a record sets it to 0
  redis.call('HINCRBY', k.run(run_id), 'retries_in_all', 1) -- for display
  local due = put_off()
  if call ~= '' then count_up(k.facts(run_id), FACT.tries .. call) end
  events[#events + 1] = 'run.retry_scheduled'
  events[#events + 1] = '{"due_at":"' .. iso(due) .. '","delay_ms":' .. digits(delay_ms) .. ',"error_code":' .. q(error_code)
    .. ',"attempt_index":' .. digits(run.retries + 1) .. '}'
elseif kind == 'left_to_others' then
  local again_in_ms, is_first = left_again_in(run, left_max_ms, delay_ms > 0 and delay_ms or nil)
  if not again_in_ms then return reply{answer = 'OVERDUE'} end
  delay_ms = again_in_ms
  put_off()
  if is_first then
    events[#events + 1] = 'run.left_to_others'
    events[#events + 1] = '{"left_by":' .. q(run.owner) .. ',"delay_ms":' .. digits(delay_ms) .. ',"error_code":' .. q(error_code) .. '}'
  end
else
  return redis.error_reply('ERR suspend has no kind ' .. kind)
end
for i = 1, #facts, 2 do redis.call('HSET', k.facts(run_id), facts[i], facts[i + 1]) end -- `unpack` takes 8,000 at most
for _, fact in ipairs(closed) do redis.call('HDEL', k.facts(run_id), fact) end
leave(run)
append(run, events)
if is_queued then
  wakes[1] = wake_of(run)
elseif limit ~= '' then
  wakes = serve(limit_of(limit))
elseif kind == 'park' then
  wakes = {begin_shared(run)}
end
return reply{answer = 'OK', wakes = wakes, delay_ms = delay_ms}
