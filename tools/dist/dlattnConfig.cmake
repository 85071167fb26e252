# dlattn::dlattn links the library; dlattn::loader is <dlattn_loader.h>, which finds it at run time.
get_filename_component(_dlattn_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET dlattn::loader)
  add_library(dlattn::loader INTERFACE IMPORTED)
  set_target_properties(dlattn::loader PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${_dlattn_prefix}/include"
    INTERFACE_LINK_LIBRARIES "${CMAKE_DL_LIBS}")
endif()

if(NOT TARGET dlattn::dlattn)
  add_library(dlattn::dlattn SHARED IMPORTED)
  set_target_properties(dlattn::dlattn PROPERTIES
    IMPORTED_LOCATION "${_dlattn_prefix}/lib/libdlattn.so.1"
    IMPORTED_SONAME libdlattn.so.1
    INTERFACE_INCLUDE_DIRECTORIES "${_dlattn_prefix}/include")
endif()

unset(_dlattn_prefix)
