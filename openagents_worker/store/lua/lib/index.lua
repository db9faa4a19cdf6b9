--#include time
-- The indexes of runs and sessions. The script that creates a run or a session also writes its indexes.
local SESSIONS = 'sessions' -- the index of sessions; all others are indexes of runs
local APPROVALS = 'approvals' -- the index of the runs with calls that wait for an approval
local LOOKED_AT = 2 -- entries that are examined when one is added: an index shrinks if more than half of its entries have expired

local function ttl_ms_of(name) return name == SESSIONS and SESSION_TTL_MS or RUN_TTL_MS end

-- is_gone(name, id, added): whether the record of this entry, which was added at this time, has expired. If there is a record, it may be that of a
-- later run with this id, which may be of another session or tenant
local function is_gone(name, id, added)
  if name == SESSIONS then return redis.call('EXISTS', k.session(id)) == 0 end
  local created = redis.pcall('HGET', k.run(id), 'created') -- an error: a key of a wrong type
  if not created then return redis.call('EXISTS', k.run(id)) == 0 end
  return not created.err and tonumber(added) < (tonumber(created) or 0)
end

-- take_out_some(name): examines a few entries that are older than the TTL, and removes those that have expired.
-- The last digits of the clock select them, so that old entries that still exist do not prevent the removal of others.
local function take_out_some(name)
  local key = k.index(name)
  local old = redis.call('ZCOUNT', key, '-inf', digits(NOW_MS - ttl_ms_of(name)))
  if old == 0 then return end
  local first = NOW_US % math.max(old - LOOKED_AT + 1, 1)
  local found = redis.call('ZRANGE', key, first, math.min(first + LOOKED_AT, old) - 1, 'WITHSCORES')
  for i = 1, #found, 2 do
    if is_gone(name, found[i], found[i + 1]) then redis.call('ZREM', key, found[i]) end
  end
end

local function list_in(name, id)
  redis.call('ZADD', k.index(name), digits(NOW_MS), id)
  redis.call('ZADD', k.indexes(), 'NX', digits(NOW_MS + ttl_ms_of(name)), name)
  take_out_some(name)
end

-- waits_for_approval(R): whether a call of the run was asked about and not decided
local function waits_for_approval(R)
  for _, fact in ipairs(redis.call('HKEYS', k.facts(R))) do
    local asked = string.match(fact, '^' .. FACT.ask .. '(.*)$')
    if asked and redis.call('HEXISTS', k.facts(R), FACT.approval .. asked) == 0 then return true end
  end
  return false
end

-- take_facts(R, names): removes the facts that records replace. A run of which no other call waits for an approval is not listed any more
local function take_facts(R, names)
  local has_taken_question = false
  for _, fact in ipairs(names) do
    redis.call('HDEL', k.facts(R), fact)
    has_taken_question = has_taken_question or string.sub(fact, 1, #FACT.ask) == FACT.ask
  end
  if has_taken_question and not waits_for_approval(R) then redis.call('ZREM', k.index(APPROVALS), R) end
end

-- lists_of(run, more): the indexes of a run; `more` are those of its tenant and labels
local function lists_of(run, more)
  local lists = {'all', 'agent=' .. run.agent, 'session=' .. run.session}
  for _, name in ipairs(more) do lists[#lists + 1] = name end
  return lists
end
