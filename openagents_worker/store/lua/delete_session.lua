-- Deletes the runs of a session, oldest first, up to `limit` in a call, and the session with the last of them. A live run is never deleted.
-- Returns `Deleted`. UNTOLD: somebody was not notified of the end of a run yet: Celery, or the worker that cancels what the run has left behind.
-- `even_if_not_notified` does not wait for this
--#include session

-- texts(list): the strings of a decoded list
local function texts(list)
  local found = {}
  for _, item in ipairs(list or {}) do if type(item) == 'string' then found[#found + 1] = item end end
  return found
end

-- What a run may leave behind at other services, and the recipient of its end that cancels this: it needs the facts and the record of the run
local CANCELS = {{fact = FACT.job, recipient = 'open_jobs'}, {fact = FACT.response, recipient = 'open_responses'}}

-- has_left_behind(id, life): whether a worker must still cancel something that this life of the run has left behind
local function has_left_behind(id, life)
  local entry, names = digits(math.max(count_of(life), 1)) .. ':' .. id, nil
  for _, kind in ipairs(CANCELS) do
    if redis.call('ZSCORE', k.outbox(kind.recipient), entry) then
      names = names or redis.pcall('HKEYS', k.facts(id))
      for _, name in ipairs(names.err and {} or names) do
        if string.sub(name, 1, #kind.fact) == kind.fact then return true end
      end
    end
  end
  return false
end

local held = holder(session_id)
if held then return reply{answer = 'BUSY', run_id = held} end
local queue = redis.call('ZRANGE', k.session_queue(session_id), 0, limit - 1)
for _, waiting in ipairs(queue) do
  if is_known(waiting) then return reply{answer = 'BUSY', run_id = waiting} end
end
for _, gone in ipairs(queue) do redis.call('ZREM', k.session_queue(session_id), gone) end -- these runs do not exist
if #queue == limit then return reply{answer = 'MORE'} end -- there may be more

local ids = redis.call('ZRANGE', k.index('session=' .. session_id), 0, limit - 1)
local found, foreign, pending_run = {}, {}, nil
for _, id in ipairs(ids) do
  local fields = redis.pcall('HMGET', k.run(id), 'state', 'agent', 'queue', 'lists', 'untold', 'life', 'session')
  local state, agent, queue, more, notify_pending, life, session = unpack(fields.err and {} or fields) -- a key of a wrong type is deleted, too
  if state and session and session ~= session_id then -- a later run with the id of one that has expired
    foreign[#foreign + 1] = id
  else
    if state and not TERMINAL[state] then return reply{answer = 'BUSY', run_id = id} end -- a delayed run: it is not in the queue of the session yet
    if even_if_not_notified == 0 and not pending_run and (notify_pending or state and has_left_behind(id, life)) then pending_run = id end
    found[#found + 1] = {id = id, session = session_id, agent = agent or '', queue = queue or '', more = texts(decoded(more or ''))}
  end
end
if pending_run then return reply{answer = 'UNTOLD', run_id = pending_run} end -- BUSY takes precedence, whatever the order of the runs
for _, id in ipairs(foreign) do redis.call('ZREM', k.index('session=' .. session_id), id) end
for _, run in ipairs(found) do
  for _, name in ipairs(lists_of(run, run.more)) do redis.call('ZREM', k.index(name), run.id) end
  redis.call('ZREM', k.sent(run.queue), run.id)
  redis.call('UNLINK', k.reply(run.id), k.message_ids(run.id), unpack(keys_of(run.id)))
end
if #ids == limit then return reply{answer = 'MORE', runs = #found} end
redis.call('ZREM', k.index(SESSIONS), session_id)
redis.call('ZREM', k.indexes(), 'session=' .. session_id)
redis.call('UNLINK', unpack(session_keys(session_id)))
return reply{answer = 'DELETED', runs = #found}
