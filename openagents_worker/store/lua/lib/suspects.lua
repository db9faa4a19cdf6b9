--#include run
--#include records
-- Finds the run that kills its worker processes, by bisection. When a process dies, its runs without a new record since their claim become
-- suspects: half of them form one group, half another. Runs that already were a group of suspects are halved separately.
-- A process executes suspects of one group only, beside any number of other runs. So each death halves the group with the run that kills. A death
-- counts (`stuck`) only for a run that was the single suspect of its process, and after too many of them the run is poisoned.
-- A record removes all suspicion. If the lease ended without a death (the process answers again, other leases ended within a heartbeat, or the
-- watchdog named another run), no suspicion is added, at most three times in a row without a record.
local SUSPECTS_KEPT_MS = 86400000 -- a worker of the previous version does not delete the set when it reclaims runs

-- sound(held): a suspicion with all fields, even if the stored value is invalid
local function sound(held)
  if type(held) ~= 'table' then held = {} end
  local function text(name) return type(held[name]) == 'string' and held[name] or '' end
  return {group = text('group'), by = text('by'), at = text('at'), halved = whole(held.halved), spared = whole(held.spared),
    named = whole(held.named)}
end

-- suspicion_of(run): group ('': none), halved (deaths with other suspects in the process), spared (in a row), named (by the watchdog), by (the
-- incarnation that died). A worker of the previous version stores none for runs that died twice: such a run is a group with one member.
local function suspicion_of(run)
  if run.suspicion == '' and run.stuck < 2 then return {group = '', halved = 0, spared = 0, named = 0, by = ''} end
  local at = digits(run.life) .. ':' .. digits(journal_length(run.id))
  local held = run.suspicion ~= '' and sound(decoded(run.suspicion)) or {}
  if held.at == at then return held end
  return {group = run.stuck >= 2 and run.id or '', halved = 0, spared = 0, named = 0, by = ''}
end

-- group_in(I): the group of the suspects that the worker executes, '' for none
local function group_in(incarnation)
  while true do
    local id = redis.call('SRANDMEMBER', k.suspects(incarnation))
    if not id then return '' end
    local run = load(id)
    local group = run and run.owner == incarnation and suspicion_of(run).group or ''
    if group ~= '' then return group end
    redis.call('SREM', k.suspects(incarnation), id) -- a worker of the previous version has reclaimed it
  end
end
