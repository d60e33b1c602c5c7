-- bury(stream, dlq, id, notes, tries) -> id of the dead letter, or nil where the entry is gone. Copies the entry's fields, less any
-- dead_*, and adds the notes and when the mail failed first: as its value in `tries` says, else at its death (`dead_at` of the
-- notes). At most 1,000 pairs are copied: a foreign entry may hold more than `unpack` can pass on.
local function iso(ms)                            -- Gregorian calendar, days counted from 1 March (Hinnant's civil_from_days)
  local seconds = math.floor(ms / 1000)
  local day = math.floor(seconds / 86400) + 719468
  local era = math.floor(day / 146097)
  local doe = day - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local month = math.floor((5 * doy + 2) / 153)
  local date = doy - math.floor((153 * month + 2) / 5) + 1
  month = month < 10 and month + 3 or month - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local clock = seconds % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02dZ', year, month, date, math.floor(clock / 3600), math.floor(clock / 60) % 60, clock % 60)
end
local function bury(stream, dlq, id, notes, tries)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if not entry then return nil end
  local fields, copy = entry[2], {}
  for i = 1, math.min(#fields, 2000), 2 do
    if string.sub(fields[i], 1, 5) ~= 'dead_' then
      copy[#copy + 1] = fields[i]
      copy[#copy + 1] = fields[i + 1]
    end
  end
  local first = tonumber(string.match(tries or '', '^%d+|%d+|(%d+)$'))
  copy[#copy + 1] = 'dead_first_at'
  copy[#copy + 1] = first and iso(first) or ''
  for i = 1, #notes, 2 do
    if notes[i] == 'dead_at' and not first then copy[#copy] = notes[i + 1] end
  end
  for i = 1, #notes do copy[#copy + 1] = notes[i] end
  return redis.call('XADD', dlq, '*', unpack(copy))
end
