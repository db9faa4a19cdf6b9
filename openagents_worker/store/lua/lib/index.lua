--#include time
-- The indexes of runs and sessions. The script that creates a run or a session also writes its indexes.
local SESSIONS = 'sessions' -- the index of sessions; all others are indexes of runs
local APPROVALS = 'approvals' -- the index of the runs with calls that wait for an approval
local LOOKED_AT = 2 -- entries that are examined when one is added: an index shrinks if more than half of its entries have expired

local function ttl_ms_of(name) return name == SESSIONS and SESSION_TTL_MS or RUN_TTL_MS end

-- is_gone(name, id): whether the record of this entry has expired
local function is_gone(name, id) return redis.call('EXISTS', name == SESSIONS and k.session(id) or k.run(id)) == 0 end

-- take_out_some(name): examines a few entries that are older than the TTL, and removes those that have expired.
-- The last digits of the clock select them, so that old entries that still exist do not prevent the removal of others.
local function take_out_some(name)
  local key = k.index(name)
  local old = redis.call('ZCOUNT', key, '-inf', digits(NOW_MS - ttl_ms_of(name)))
  if old == 0 then return end
  local first = NOW_US % math.max(old - LOOKED_AT + 1, 1)
  for _, id in ipairs(redis.call('ZRANGE', key, first, math.min(first + LOOKED_AT, old) - 1)) do
    if is_gone(name, id) then redis.call('ZREM', key, id) end
  end
end

local function list_in(name, id)
  redis.call('ZADD', k.index(name), digits(NOW_MS), id)
  redis.call('ZADD', k.indexes(), 'NX', digits(NOW_MS + ttl_ms_of(name)), name)
  take_out_some(name)
end

-- lists_of(run, more): the indexes of a run; `more` are those of its tenant and labels
local function lists_of(run, more)
  local lists = {'all', 'agent=' .. run.agent, 'session=' .. run.session}
  for _, name in ipairs(more) do lists[#lists + 1] = name end
  return lists
end
