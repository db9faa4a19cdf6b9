-- Decides about a call. kind `approval`: a call that waits for an approval. kind `resolution`: a call with effects that was interrupted before its
-- outcome was stored; the worker that made it passes its fence when it learns the outcome, everybody else passes ''. A call that an attempt is
-- making is not pending for others. The first decision counts: it is stored as a fact, and kept with the run.
-- Returns `DecideResult`. Event `event` with `payload`.
--#include parked
--#include index
local run = load(run_id)
if not run then return reply{answer = 'UNKNOWN'} end
local facts, kept = k.facts(run_id), k.decisions(run_id)
needs(facts, 'hash')
needs(kept, 'hash')

local function is_pending()
  if kind == 'approval' then return redis.call('HEXISTS', facts, FACT.ask .. call) == 1 end
  local begun_by = redis.call('HGET', facts, FACT.fence .. call)
  if not begun_by or (fence ~= '' and begun_by ~= fence) then return false end
  if fence ~= '' then return true end -- also before another worker has the run
  return not (run.state == STATE.running and begun_by == run.fence)
end

if kind ~= 'approval' and kind ~= 'resolution' then return redis.error_reply('ERR decide has no kind ' .. kind) end
local name = kind .. ':' .. call
local decision = redis.call('HGET', facts, name)
if decision then return reply{answer = 'ALREADY', decision = decision} end
if TERMINAL[run.state] then return reply{answer = 'GONE', decision = redis.call('HGET', kept, call) or ''} end
if not is_pending() then return reply{answer = 'NOT_PENDING', decision = redis.call('HGET', kept, call) or ''} end
redis.call('HSET', kept, call, value)
append(run, {event, payload})
local wakes = store_fact(run, name, value)
if kind == 'approval' and not waits_for_approval(run_id) then redis.call('ZREM', k.index(APPROVALS), run_id) end
return reply{answer = 'OK', wakes = wakes}
