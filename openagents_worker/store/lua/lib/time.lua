-- The clock of the Redis server. Every stored time comes from it, so that times of different clocks are never compared.
local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000), t[1] * 1000000 + t[2]
end
local NOW_MS, NOW_US = clock()

-- iso(ms): ISO 8601 from milliseconds since 1970 (days to a civil date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms")
local function iso(ms)
  local floor = math.floor
  local days = floor(ms / 86400000)
  local rest = ms - days * 86400000
  local z = days + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local day = doy - floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local s = floor(rest / 1000)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day,
    floor(s / 3600), floor(s / 60) % 60, s % 60, rest % 1000)
end

-- digits(n): a number as decimal digits; tostring in Lua writes 1.7e15 with an exponent.
local function digits(n) return string.format('%.0f', n) end
