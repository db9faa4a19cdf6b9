-- Stores a fact about a run that has not ended, and wakes the run if it waits for it. `name`: `kind:id` of a fact that is decided once (the
-- first one counts, ALREADY has its value), or `kind:id:` of numbered facts, of which there may be several.
-- A `message_id` that was stored before is not stored again (SAME). FULL: the numbered facts of its kind would exceed `max_facts` or `max_bytes`.
-- Returns `FactResult`. Event run.woken.
--#include parked
local MESSAGE_IDS, MESSAGE_IDS_MS = 10000, 604800000 -- a sender repeats a message within minutes; a week is on the safe side

-- is_full(): whether the facts of this kind that were not taken yet leave no room for this value
local function is_full()
  local kind = string.match(name, '^[^:]+:')
  local count, bytes = 1, #value
  for _, stored in ipairs(redis.call('HKEYS', k.facts(run_id))) do
    if string.sub(stored, 1, #kind) == kind then
      count, bytes = count + 1, bytes + redis.call('HSTRLEN', k.facts(run_id), stored)
    end
  end
  return count > max_facts or bytes > max_bytes
end

local run = load(run_id)
if not run then return reply{answer = 'UNKNOWN'} end
if TERMINAL[run.state] then return reply{answer = 'ENDED', state = run.state} end
needs(k.facts(run_id), 'hash')
if string.sub(name, -1) == ':' then
  if message_id ~= '' and redis.call('ZSCORE', k.message_ids(run_id), message_id) then return reply{answer = 'SAME', state = run.state} end
  if is_full() then return reply{answer = 'FULL', state = run.state} end
else
  local first = redis.call('HGET', k.facts(run_id), name)
  if first then return reply{answer = 'ALREADY', state = run.state, value = first} end
end
local wakes, number = store_fact(run, name, value)
if message_id ~= '' then
  redis.call('ZADD', k.message_ids(run_id), digits(number), message_id)
  redis.call('ZREMRANGEBYRANK', k.message_ids(run_id), 0, -MESSAGE_IDS - 1)
  redis.call('PEXPIRE', k.message_ids(run_id), MESSAGE_IDS_MS)
end
return reply{answer = 'OK', state = run.state, wakes = wakes}
