-- Deletes a session's runs, oldest first, `limit` a call, and with the last of them the session. Nothing live is ever deleted.
-- Returns BUSY, run | UNTOLD, run (its end is still to be told to Celery; `even_untold` does not wait for that) | MORE, runs | DELETED, runs
--#include session

-- texts(list): what of a decoded list is text
local function texts(list)
  local found = {}
  for _, item in ipairs(list or {}) do if type(item) == 'string' then found[#found + 1] = item end end
  return found
end

local held = holder(session_id)
if held then return {'BUSY', held} end
local queue = redis.call('ZRANGE', k.session_queue(session_id), 0, limit - 1)
for _, waiting in ipairs(queue) do
  if is_known(waiting) then return {'BUSY', waiting} end
end
for _, gone in ipairs(queue) do redis.call('ZREM', k.session_queue(session_id), gone) end -- nobody waits there
if #queue == limit then return {'MORE', '0'} end -- there may be more behind

local ids = redis.call('ZRANGE', k.index('session=' .. session_id), 0, limit - 1)
local found, untold_run = {}, nil
for _, id in ipairs(ids) do
  local fields = redis.pcall('HMGET', k.run(id), 'state', 'agent', 'queue', 'lists', 'untold')
  local state, agent, queue, more, untold = unpack(fields.err and {} or fields) -- a key that is not a record is deleted, too
  if state and not TERMINAL[state] then return {'BUSY', id} end -- a delayed one: it has no place in the session yet
  if untold and even_untold == 0 then untold_run = untold_run or id end
  found[#found + 1] = {id = id, session = session_id, agent = agent or '', queue = queue or '', more = texts(decoded(more or ''))}
end
if untold_run then return {'UNTOLD', untold_run} end -- after BUSY, which is the graver reason, whatever their order
for _, run in ipairs(found) do
  for _, name in ipairs(lists_of(run, run.more)) do redis.call('ZREM', k.index(name), run.id) end
  redis.call('ZREM', k.sent(run.queue), run.id)
  redis.call('UNLINK', k.run(run.id), k.facts(run.id), k.events(run.id), k.journal(run.id), k.reply(run.id))
end
if #ids == limit then return {'MORE', digits(#ids)} end
redis.call('ZREM', k.index(SESSIONS), session_id)
redis.call('ZREM', k.indexes(), 'session=' .. session_id)
redis.call('UNLINK', unpack(session_keys(session_id)))
return {'DELETED', digits(#ids)}
