--#include records
-- The usage of children whose results a run has not recorded: those for which it waits, and those that it has given up. The usage of a run is JSON
-- that is never encoded. Its fields are numbers, of which those in milliseconds are not added, and `cost_breakdown`, an object of numbers.
local MOST_COUNTED = 1000 -- children whose usage one call of a script reads: some twenty milliseconds
local counts_left = MOST_COUNTED

local function number_in(value) return type(value) == 'number' and value or 0 end

local function add_numbers(total, more)
  for name, value in pairs(more) do
    if type(value) == 'number' and not string.find(name, '_ms$') then total[name] = number_in(total[name]) + value end
  end
end

-- unrecorded_children(run): their ids; each once, also if its call is made again after it was given up
local function unrecorded_children(run)
  local names = redis.pcall('HKEYS', k.facts(run.id))
  local ids, known = {}, {}
  for _, name in ipairs(names.err and {} or names) do
    local id = string.match(name, '^' .. FACT.given_up .. '(.+)$')
    if string.match(name, '^' .. FACT.delegated) then
      local delegated = decoded(redis.call('HGET', k.facts(run.id), name))
      id = delegated and delegated.run_id
    end
    if type(id) == 'string' and not known[id] then
      known[id] = true
      ids[#ids + 1] = id
    end
  end
  return ids
end

-- usage_with_children(run): the usage of a run that ends, with what these children have used so far (JSON); nil if they have not used anything.
-- Children in the background do not count
local function usage_with_children(run)
  local total, found = nil, false
  for _, id in ipairs(unrecorded_children(run)) do
    if counts_left == 0 then break end
    counts_left = counts_left - 1
    local values = redis.pcall('HMGET', k.run(id), 'usage_in_all', 'usage', 'background')
    local usage = not values.err and values[3] ~= '1' and decoded(values[1] or values[2] or '')
    if usage then
      total, found = total or decoded(run.usage) or {}, true
      add_numbers(total, usage)
      if type(usage.cost_breakdown) == 'table' then
        if type(total.cost_breakdown) ~= 'table' then total.cost_breakdown = {} end
        add_numbers(total.cost_breakdown, usage.cost_breakdown)
      end
    end
  end
  return found and cjson.encode(total) or nil
end
