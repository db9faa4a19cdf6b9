-- The owner writes the intent of a call with effects, ahead of its record, with a batch of events. `call` names the facts of the call. An earlier
-- intent of this call, its decision, and the facts in `taken` are replaced.
-- Somebody may have decided about the earlier intent since the claim: unless `knows_decision`, only the events are written, and the reply has
-- the decision. `stored` is the number of records that the owner has stored; MISPLACED: Redis has lost some of them. Returns `Begun`
--#include run
--#include records
local run = live(run_id, fence)
if not run then return reply{answer = 'FENCED'} end
local facts = k.facts(run_id)
needs(facts, 'hash')
if redis.call('LLEN', k.journal(run_id)) < stored then return reply{answer = 'MISPLACED', decision = ''} end
local decision = knows_decision == 0 and redis.call('HGET', facts, FACT.resolution .. call)
if batch_no <= run.emit_no then return reply{answer = 'SAME', decision = decision or ''} end
if not decision then
  redis.call('HSET', facts, FACT.intent .. call, value, FACT.fence .. call, fence)
  redis.call('HDEL', facts, FACT.resolution .. call)
  for _, fact in ipairs(taken) do redis.call('HDEL', facts, fact) end
end
redis.call('HSET', k.run(run_id), 'emit_no', batch_no)
append(run, events)
return reply{answer = 'OK', decision = decision or ''}
