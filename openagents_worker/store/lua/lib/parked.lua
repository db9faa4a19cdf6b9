--#include run
--#include records
-- Parked runs: a run that waits for facts or for a time, and holds no slot. The field `waits` of its record is a list of waits (JSON), see
-- store/parking.py. Facts are written before the run is woken, by the same script.

-- waits_of(R): the waits of a parked run; an unreadable list is empty
local function waits_of(R)
  local waits = {}
  for _, wait in ipairs(decoded(field_of(R, 'waits') or '') or {}) do
    if type(wait) == 'table' then waits[#waits + 1] = wait end
  end
  return waits
end

local function text_in(wait, name) return type(wait[name]) == 'string' and wait[name] or '' end

-- is_ended_by(wait, fact): whether the fact with this name ends the wait. Numbered facts are named `signal:payment:7`, the wait `signal:payment:`
local function is_ended_by(wait, fact)
  local awaited = text_in(wait, 'fact')
  if awaited == '' then return false end
  if awaited == fact then return true end
  return string.sub(awaited, -1) == ':' and string.sub(fact, 1, #awaited) == awaited and string.find(fact, '^%d+$', #awaited + 1) ~= nil
end

-- unpark(run, wait): the parked run continues because this wait has ended; returns its wake-up
local function unpark(run, wait)
  redis.call('HSET', k.run(run.id), 'state', STATE.queued)
  redis.call('HDEL', k.run(run.id), 'waits', 'due')
  redis.call('ZREM', k.timeouts(), run.id)
  local payload = '{"kind":' .. q(text_in(wait, 'kind'))
  for _, name in ipairs({'name', 'call_id'}) do
    if text_in(wait, name) ~= '' then payload = payload .. ',"' .. name .. '":' .. q(wait[name]) end
  end
  append(run, {'run.woken', payload .. '}'})
  return wake_of(run)
end

-- woken_by(run, fact): wakes the run if it is parked and this fact, which is stored, lets it continue. Waits that need all of their facts are those of
-- one kind: an approval does not wait for children. Returns the wake-ups to send
local function woken_by(run, fact)
  if not PARKED[run.state] then return {} end
  local waits, ended = waits_of(run.id), nil
  for _, wait in ipairs(waits) do
    if is_ended_by(wait, fact) then ended = ended or wait end
  end
  if not ended then return {} end
  if ended.needs_all == true then
    for _, wait in ipairs(waits) do
      if wait.needs_all == true and text_in(wait, 'kind') == text_in(ended, 'kind') and redis.call('HEXISTS', k.facts(run.id), text_in(wait, 'fact')) == 0 then return {} end
    end
  end
  return {unpark(run, ended)}
end

-- announce_fact(run, number): notifies the worker of a run that is being executed of a new fact
local function announce_fact(run, number)
  if run.owner == '' then return end
  local notice = ' {"kind":"fact","number":' .. digits(number) .. ',"run":' .. q(run.id) .. '}'
  redis.call('SADD', k.worker_box(run.owner), notice)
  redis.call('PUBLISH', k.notices(run.owner), notice)
end

-- store_fact(run, name, value): stores a fact from outside, and wakes the run or notifies its worker. Returns the wake-ups to send, and the number
-- of the fact. Every fact of a run has a higher number than the ones before it
local function store_fact(run, name, value)
  local number = count_up(k.run(run.id), 'facts_no')
  if string.sub(name, -1) == ':' then name = name .. digits(number) end
  redis.call('HSET', k.facts(run.id), name, value)
  announce_fact(run, number)
  return woken_by(run, name), number
end
